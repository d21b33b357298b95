"""Large training sets: tokenized in one process and held there, to a file on all cores, and mapped by the others."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.alone import alone
from benchmarks.harness import Measured, cpu_seconds, peak_rss
from benchmarks.tokenize_rows import BLOCK, CHATML, blocks_of, tokenizer_of
from ema_scale.core.devices import free_cores

WORDS = 205  # about 280 tokens
MAX_LENGTH = 2048
HELD = "one process, in memory (before: every process)"


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


def prepared(folder: str, cores: int, cache: bool) -> dict[str, float]:
    """From the file to the dataset, as a process of a training does it: seconds, and the memory that it adds."""
    from ema_scale.data import token_workers
    from ema_scale.data.rows import RowSource
    from ema_scale.data.tokens import load_tokenizer
    from ema_scale.defenses.row_groups import RowGroups
    from ema_scale.training import data

    token_workers.free_cores = lambda: cores
    data.LARGE_FILES = 0  # however few rows are asked for
    place = Path(folder)
    source, tokenizer = RowSource([str(place / "rows.jsonl")]), load_tokenizer(str(place / "tokenizer"))
    before, started, wall = peak_rss(), cpu_seconds(), time.perf_counter()
    dataset, report = data.prepare_data(
        source, RowGroups(), tokenizer, max_length=MAX_LENGTH, token_cache=place / "tokens" if cache else None
    )
    return {
        "cpu": cpu_seconds() - started,
        "wall": time.perf_counter() - wall,
        "peak": peak_rss() - before,
        "tokens": report.tokens["tokens"] / report.tokens["rows"],
        "first": _checksum(dataset),
    }


def _checksum(dataset: Any) -> float:
    return float(sum(sum(dataset[row]["input_ids"]) for row in (0, len(dataset) // 2, len(dataset) - 1)))


def checked(folder: str) -> dict[str, float]:
    """`ema data check`, after a training has tokenized the rows."""
    from ema_scale.data.check import check_data
    from ema_scale.data.tokens import load_tokenizer

    place = Path(folder)
    tokenizer = load_tokenizer(str(place / "tokenizer"))
    before, started, wall = peak_rss(), cpu_seconds(), time.perf_counter()
    check_data(str(place / "rows.jsonl"), tokenizer, MAX_LENGTH, cache=place / "tokens")
    return {"cpu": cpu_seconds() - started, "wall": time.perf_counter() - wall, "peak": peak_rss() - before}


def bench_many_rows(rows: int, before: bool = True) -> Iterator[Measured]:
    """One row per way, each in a process of its own, as soon as it is measured. Memory is what it adds to its imports.

    before: also one process that holds all rows in its memory. Figures: `cpu` seconds; `per_row`, microseconds of them.
    """
    cores = free_cores()
    with tempfile.TemporaryDirectory() as root:
        write_rows(Path(root, "rows.jsonl"), rows)
        write_tokenizer(Path(root, "tokenizer"))
        ways: dict[str, tuple[str, dict[str, Any]]] = {
            HELD: ("prepared", {"cores": 1, "cache": False}),
            f"the first process, on {cores} cores, to a file": ("prepared", {"cores": cores, "cache": True}),
            "every other process, which maps that file": ("prepared", {"cores": cores, "cache": True}),
            "`ema data check` after it": ("checked", {}),
        }
        if not before:
            del ways[HELD]
        first = None
        for name, (way, options) in ways.items():
            found = alone(f"benchmarks.many_rows:{way}", folder=root, **options)
            if found is None:
                yield Measured(name, note="out of memory")
                continue
            if first is not None and found.get("first", first) != first:
                raise AssertionError(f"{name}: other tokens")
            first = found.get("first", first)
            note = f"{found['tokens']:.0f} tokens per row" if "tokens" in found else ""
            cpu, peak = found["cpu"], int(found["peak"])
            figures = {"cpu": cpu, "per_row": 1e6 * cpu / rows}
            yield Measured(name, [found["wall"]], peak, figures=figures, note=note)
