"""Large training sets: tokenized in one process and held there, on all cores, and mapped by the next process."""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.alone import alone
from benchmarks.harness import Measured, peak_rss
from benchmarks.tokenize_rows import BLOCK, CHATML, blocks_of, tokenizer_of
from ema_scale.core.devices import free_cores

WORDS = 205  # about 280 tokens
MAX_LENGTH = 2048


def write_rows(file: Path, rows: int) -> None:
    """Rows as a user has them: a JSONL file."""
    with open(file, "w", encoding="utf-8") as out:
        for block in blocks_of(rows, WORDS):
            out.writelines(json.dumps({"messages": messages}) + "\n" for messages, _ in block)


def write_tokenizer(folder: Path) -> None:
    first = next(blocks_of(BLOCK, WORDS))
    tokenizer = tokenizer_of([m["content"] for messages, _ in first[:500] for m in messages])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(folder))


def tokenized(folder: str, cores: int, cache: bool) -> dict[str, float]:
    """CPU seconds of the tokenizing alone, on all cores; peak bytes when the rows are read, and at the end."""
    from ema_scale.data import token_workers
    from ema_scale.data.rows import load_rows
    from ema_scale.data.tokens import load_tokenizer, tokenize_rows

    token_workers.free_cores = lambda: cores
    place = Path(folder)
    rows = load_rows(str(place / "rows.jsonl"))
    read, started = peak_rss(), cpu_seconds()
    found = tokenize_rows(rows, load_tokenizer(str(place / "tokenizer")), cache=place / "tokens" if cache else None)
    seconds = cpu_seconds() - started
    tokens = found.report.tokens / found.report.rows
    return {"seconds": seconds, "read": read, "peak": peak_rss(), "tokens": tokens, "first": _checksum(found.dataset)}


def cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)


def _checksum(dataset: Any) -> float:
    return float(sum(sum(dataset[row]["input_ids"]) for row in (0, len(dataset) // 2, len(dataset) - 1)))


def checked(folder: str) -> dict[str, float]:
    """`ema data check`, after a training has tokenized the rows."""
    from ema_scale.data.check import check_data
    from ema_scale.data.tokens import load_tokenizer

    place = Path(folder)
    tokenizer, started = load_tokenizer(str(place / "tokenizer")), cpu_seconds()
    check_data(str(place / "rows.jsonl"), tokenizer, MAX_LENGTH, cache=place / "tokens")
    return {"seconds": cpu_seconds() - started, "peak": peak_rss()}


def bench_many_rows(rows: int) -> Iterator[Measured]:
    """One row per way, each in a process of its own."""
    cores = free_cores()
    with tempfile.TemporaryDirectory() as root:
        write_rows(Path(root, "rows.jsonl"), rows)
        write_tokenizer(Path(root, "tokenizer"))
        ways: dict[str, dict[str, Any]] = {
            "one process, in memory (as before)": {"cores": 1, "cache": False},
            f"{cores} cores, to a file that is shared": {"cores": cores, "cache": True},
            "the next process, which maps that file": {"cores": cores, "cache": True},
        }
        first = None
        for name, options in ways.items():
            found = alone("benchmarks.many_rows:tokenized", folder=root, **options)
            if found is None:
                yield Measured(name, note="out of memory")
                continue
            if first is not None and found["first"] != first:
                raise AssertionError(f"{name}: other tokens")
            first = found["first"]
            note = (
                f"{found['tokens']:.0f} tokens per row; {(found['peak'] - found['read']) / 2**20:,.0f} MiB beside rows"
            )
            yield Measured(name, [found["seconds"]], int(found["peak"]), note=note)
        if (found := alone("benchmarks.many_rows:checked", folder=root)) is not None:
            yield Measured("`ema data check` after it", [found["seconds"]], int(found["peak"]))
