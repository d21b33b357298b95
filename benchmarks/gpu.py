"""Everything that only a GPU can show, in one command of under eight minutes: is it right, how fast, how large.

    python benchmarks/gpu.py --out runs/gpu            # one GPU, random weights of real shapes; nothing is downloaded
    python benchmarks/gpu.py --out runs/gpu --rehearse # the same on a CPU at tiny sizes: no figure means anything

Every section runs in a process of its own, forked when all modules are imported, and adds its rows to a file as they
come. gpu.json and gpu.md are written after each section. What fails is a row with its error, and the exit code is 1 if
a check of correctness failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# As a script its folder is on the path, not the repository.
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.report import (  # noqa: E402
    Rows,
    Show,
    gibibytes,
    milliseconds,
    number,
    percent,
    signed,
    write,
    yes,
)

_ERROR: dict[str, Show] = {name: number(".1e") for name in ("value", "gradient", "gradient of products")}
_SAME: dict[str, Show] = {name: number(".1e") for name in ("loss", "gradient norm", "change")}
_STEP: dict[str, Show] = {
    "seconds": milliseconds, "low": milliseconds, "high": milliseconds, "ratio": number(".2f"), "floor": number(".2f"),
    "arithmetic": milliseconds, "tokens_per_second": number(",.0f"), "mfu": percent, "memory": gibibytes,
    "planned": gibibytes, "plan_off": signed, "used": gibibytes, "planned_whole": gibibytes, "whole_off": signed,
}  # fmt: skip
# section -> title, columns; in the order in which they run, and its seconds at most.
TABLES: dict[str, tuple[str, dict[str, Show]]] = {
    "ceilings": ("What the device reaches", {"value": number(".2f")}),
    "exact": (
        "The fused loss against float64 (relative)",
        {**_ERROR, "naive value": number(".1e"), "naive gradient": number(".1e"), "ok": yes},
    ),
    "ways": (
        "Ways to run the reference, against adapter_off (relative)",
        {**_SAME, "first loss": number(".4f"), "last loss": number(".4f"), "ok": yes},
    ),
    "loss": (
        "The loss: value and gradient",
        {
            "seconds": milliseconds, "low": milliseconds, "high": milliseconds, "ratio": number(".2f"),
            "arithmetic": milliseconds, "memory": gibibytes, "off": number(".1e"),
        },
    ),
    **{f"step-{size}": (f"A step, Qwen2.5 {size.upper()}", _STEP) for size in ("0.5b", "7b", "1.5b")},
    "zero3": ("ZeRO-3 against one process without it (relative)", {**_SAME, "ok": yes}),
    "fsdp2": ("FSDP2 against one process without it (relative)", {**_SAME, "ok": yes}),
    "vllm": (
        "vLLM with two adapters",
        {
            "answers": number(",d"), "same": percent, "told apart": str, "answers_per_second": number(",.0f"),
            "tokens_per_second": number(",.0f"), "ok": yes,
        },
    ),
}  # fmt: skip
MACHINE = "machine"
LIMIT = {"loss": 120, "vllm": 180}
SECONDS = 90


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), metavar="SECTION", help=", ".join(TABLES))
    parser.add_argument("--minutes", type=float, default=8, help="no section begins or goes on after these")
    asked = parser.parse_args()
    return measure(asked.out, asked.only or list(TABLES), rehearse=asked.rehearse, seconds=60 * asked.minutes)


def measure(out: Path, names: list[str], *, rehearse: bool, seconds: float) -> int:
    """Run the sections in turn; 1 if a check of correctness failed, else 0."""
    began = time.monotonic()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Imported once, for all sections: from a cold disk that takes longer than some of them. None of it uses CUDA, which
    # a process must not have done that others are forked from.
    from benchmarks import (
        correctness,  # noqa: F401
        figures,  # noqa: F401
    )

    out.mkdir(parents=True, exist_ok=True)
    start, facts = "fork", run(MACHINE, 60, rehearse=rehearse)[0]
    if not rehearse and not facts.get("gpu"):  # whatever the imports have done, a new process has not
        start = "spawn"
        facts = run(MACHINE, 60, rehearse=rehearse, start=start)[0]
    report: dict[str, Any] = {
        "command": ["python", "benchmarks/gpu.py", *sys.argv[1:]],
        "rehearsal": rehearse,
        "machine": facts,
        "seconds": 0.0,
        "sections": [],
    }
    for name in names:
        left = seconds - (time.monotonic() - began)
        took = time.monotonic()
        print(f"{name} ({left:.0f} s left)", flush=True)
        rows = run(name, min(LIMIT.get(name, SECONDS), left), rehearse=rehearse, start=start)
        report["sections"].append({"section": name, "seconds": time.monotonic() - took, "rows": with_ratios(rows)})
        report["seconds"] = time.monotonic() - began
        write(out, report, TABLES)
    print((out / "gpu.md").read_text(encoding="utf-8"), flush=True)
    wrong = [row for section in report["sections"] for row in section["rows"] if row.get("ok") is False]
    for row in wrong:
        print(f"WRONG: {row['name']}", flush=True)
    return 1 if wrong else 0


def run(name: str, limit: float, *, rehearse: bool, start: str = "fork") -> list[dict[str, Any]]:
    """The rows of one section, run in a process group of its own that ends after `limit` seconds. start: how processes
    are started, of multiprocessing's ways."""
    if limit <= 0:
        return [{"name": name, "error": "not run: no time was left"}]
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        rows, log = Rows(Path(folder) / "rows.jsonl"), Path(folder) / "stderr.txt"
        context: Any = get_context(start)
        child = context.Process(target=work, args=(name, rows, log, rehearse))
        child.start()
        assert child.pid is not None
        child.join(limit)
        problem = "" if child.exitcode is not None else f"stopped after {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # what it has started goes with it
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
        told = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        print(told[-6000:], file=sys.stderr, flush=True)
        found = rows.read()
        if not problem and child.exitcode:
            problem = f"exit code {child.exitcode}: {told[-1500:].strip()}"
        return [*found, {"name": name, "error": problem}] if problem else found


def work(name: str, rows: Rows, log: Path, rehearse: bool) -> None:
    """One section, in a process of its own, which is the first of them to use CUDA."""
    import torch

    from benchmarks import correctness, figures
    from benchmarks.harness import machine
    from benchmarks.sizes import REAL, TINY

    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    if name == MACHINE:
        rows.add(MACHINE, **machine(int(os.environ.get("OMP_NUM_THREADS", "1"))))
        return
    if rehearse:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    elif subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
        rows.add(name, error="there is no GPU here; --rehearse runs tiny sizes on a CPU")
        return
    sections = {**dict(correctness.sections()), "ceilings": figures.ceilings, "loss": figures.loss}
    sizes, size = TINY if rehearse else REAL, name.removeprefix("step-")
    if name in sections:
        sections[name](rows, sizes)
    elif size in sizes.steps:
        figures.step(rows, sizes, size)
    else:
        rows.add(name, error="not part of a rehearsal")


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a step table: seconds over plain's with the same checkpointing."""
    plain = {row["name"].partition(", ")[2]: row["seconds"] for row in rows if row["name"].startswith("plain, ")
             and "logits" not in row["name"] and "seconds" in row}  # fmt: skip
    for row in rows:
        kind = next((kind for kind in plain if row["name"].endswith(kind)), None)
        if kind and "seconds" in row and "ratio" not in row:
            row["ratio"] = row["seconds"] / plain[kind]
    return rows


if __name__ == "__main__":
    sys.exit(main())
