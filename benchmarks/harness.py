"""Several ways of doing the same thing, side by side in one process: time, peak memory and what it ran on.

    ways = [Way("naive", lambda: naive(x)), Way("ours", lambda: ours(x)), Way("theirs", None, "needs a GPU")]
    finish("loss", compare(ways, baseline="naive", repeats=5), {"tokens": 512}, out=Path("loss.json"))

The ways take turns, so that a machine that slows down slows all of them down; the ratio of medians is the figure
to trust. Memory is read in a pass of its own, which nothing is timed in.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ema_scale.core.io import atomic_write_json
from ema_scale.core.run_dir import package_versions


@dataclass(frozen=True)
class Variant:
    """One way: `run()` does it once, and may return figures (name -> number) whose medians are reported.

    run: None if this machine cannot run it; `note` then says why, and the row stands as not measured.
    """

    name: str
    run: Callable[[], Mapping[str, float] | None] | None
    note: str = ""


@dataclass
class Measured:
    """One way's figures. seconds: one a repeat; peak_bytes: memory that one run needs beyond what was held before it,
    None if it cannot be told here; ratio: of medians, to the baseline; figures: medians of what `run` returned."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    ratio: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def row(self) -> dict[str, Any]:
        low, high = (min(self.seconds), max(self.seconds)) if self.seconds else (None, None)
        return {**asdict(self), "median": self.median, "min": low, "max": high}


@dataclass(frozen=True)
class Target:
    """A figure that should be at most `limit`; None: it was not measured. form: how both are shown."""

    name: str
    value: float | None
    limit: float
    form: str = "{:.2f}x"

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit

    def __str__(self) -> str:
        limit = self.form.format(self.limit)
        if self.value is None:
            return f"{self.name}: not measured (bar: at most {limit})"
        return f"{self.name}: {self.form.format(self.value)} (bar: at most {limit}): {'met' if self.met else 'MISSED'}"


def compare(
    ways: Sequence[Variant], *, baseline: str, repeats: int = 5, warmup: int = 1, memory: bool = True
) -> list[Measured]:
    """Run every way `warmup` times, then all of them in turn, `repeats` times.

    A way that runs out of memory becomes a row that says so. Raises KeyError if no way is called `baseline`.
    """
    measured = {way.name: Measured(way.name, note=way.note) for way in ways}
    measured[baseline]  # noqa: B018
    alive = {way.name: way.run for way in ways if way.run is not None}
    returned: dict[str, list[Mapping[str, float]]] = {name: [] for name in alive}
    for turn in range(warmup + repeats):
        for name, run in list(alive.items()):
            try:
                seconds, figures = _timed(run)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                measured[name] = Measured(name, note="out of memory")
                del alive[name]
                continue
            if turn >= warmup:
                measured[name].seconds.append(seconds)
                returned[name].append(figures)
    for name, run in alive.items():
        rows = returned[name]
        measured[name].figures = {k: statistics.median(r[k] for r in rows) for k in rows[0]} if rows else {}
        if memory:
            measured[name].peak_bytes = peak_bytes(run)
    add_ratios(list(measured.values()), baseline)
    return list(measured.values())


def add_ratios(measured: Sequence[Measured], baseline: str) -> None:
    """Fill in `ratio`: median seconds over the baseline's."""
    base = next(m for m in measured if m.name == baseline).median
    for one in measured:
        one.ratio = one.median / base if one.median is not None and base else None


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Memory beyond what is held before, at the highest point of one run: on CUDA what torch's allocator gave out, on
    Linux the growth of the resident set; None elsewhere."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not reset_peak_rss():
        return None
    before = peak_rss()
    run()
    return max(0, peak_rss() - before)


def reset_peak_rss() -> bool:
    """Give freed memory back to the system and start the peak of the resident set again; whether that is possible."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else a run may live on what an earlier one left in the heap
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Highest resident set of this process since `reset_peak_rss`, in bytes. Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: no VmHWM")


def machine(threads: int | None = None) -> dict[str, Any]:
    """What it runs on; with `threads`, first set torch's number of them (also for processes started later)."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load_average": round(os.getloadavg()[0], 2),  # above the number of cores: the times are not to be trusted
        "versions": package_versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def finish(
    name: str, measured: Sequence[Measured], options: Mapping[str, Any], *, threads: int | None = None,
    out: Path | None = None, columns: Mapping[str, Callable[[float], str]] | None = None, bars: Sequence[Target] = (),
) -> dict[str, Any]:  # fmt: skip
    """Print the table (which is also Markdown) and write everything as JSON to `out`; returns what it wrote.

    columns: figure -> how to show it, for those figures of the ways that belong in the table. bars: said below it.
    """
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    facts = machine(threads)
    result = {
        "benchmark": name,
        "command": ["ema", *sys.argv[1:]],
        "options": dict(options),
        "machine": facts,
        "ways": [one.row() for one in measured],
        **({"bars": [{**asdict(bar), "met": bar.met} for bar in bars]} if bars else {}),
    }
    table = Table(box=MARKDOWN)
    for column in ("way", "median", "min - max", "ratio", "peak memory", *(columns or {}), "note"):
        table.add_column(column, justify="left" if column in ("way", "note") else "right", overflow="fold")
    for one in measured:
        shown = [show(one.figures[key]) if key in one.figures else "" for key, show in (columns or {}).items()]
        if one.median is None:
            table.add_row(one.name, "not measured here", "", "", "", *shown, one.note)
            continue
        table.add_row(
            one.name,
            seconds(one.median),
            f"{seconds(min(one.seconds))} - {seconds(max(one.seconds))}",
            "" if one.ratio is None else f"{one.ratio:.2f}x",
            "" if one.peak_bytes is None else mebibytes(one.peak_bytes),
            *shown,
            one.note,
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} thread(s), load {facts['load_average']}"
    console.print(f"{name}: {', '.join(f'{k} {v}' for k, v in options.items())}; {where}")
    console.print(table)
    for bar in bars:
        console.print(str(bar))
    if out is not None:
        atomic_write_json(out, result)
        console.print(f"wrote {out}")
    return result


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB"


def _timed(run: Callable[[], Mapping[str, float] | None]) -> tuple[float, Mapping[str, float]]:
    import torch

    gc.collect()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    figures = run()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, figures or {}


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that no memory was left."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
