"""Compare variants of one computation in one process: time, peak memory, and the machine they ran on.

    variants = [Variant("naive", lambda: naive(x)), Variant("ours", lambda: ours(x)), Variant("theirs", None, "no GPU")]
    finish("loss", compare(variants, baseline="naive", repeats=5), {"tokens": 512}, out=Path("loss.json"))

The variants take turns, so a machine that slows down slows them all, and the ratio of medians can be trusted.
Memory is read in a separate pass that is not timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ema_scale.core.io import atomic_write_json
from ema_scale.core.records import package_versions


@dataclass(frozen=True)
class Variant:
    """One way to compute something.

    Args:
        name: its row in the table.
        run: computes it once; may return figures (name -> number), whose medians are reported. None: this machine
            cannot run it.
        note: why it cannot, or a remark for the table.
    """

    name: str
    run: Callable[[], Mapping[str, float] | None] | None
    note: str = ""


@dataclass
class Measured:
    """What was measured of one variant.

    Args:
        seconds: one per repeat.
        peak_bytes: memory that one run adds at its peak; None: it cannot be measured here.
        ratio: median seconds over the baseline's.
        figures: medians of what `run` returned.
    """

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
    """A figure and its limit. value: None if it was not measured; form: how both numbers are shown."""

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
            return f"{self.name}: not measured (target: at most {limit})"
        return (
            f"{self.name}: {self.form.format(self.value)} (target: at most {limit}): {'met' if self.met else 'MISSED'}"
        )


def compare(
    variants: Sequence[Variant], *, baseline: str, repeats: int = 5, warmup: int = 1, memory: bool = True
) -> list[Measured]:
    """Run every variant `warmup` times, then all of them in turn, `repeats` times.

    A variant that runs out of memory becomes a row that says so. Raises KeyError if no variant is called `baseline`.
    """
    measured = {variant.name: Measured(variant.name, note=variant.note) for variant in variants}
    measured[baseline]  # noqa: B018
    alive = {variant.name: variant.run for variant in variants if variant.run is not None}
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
    """Bytes that one run adds at its peak: torch's allocator on CUDA, the resident set on Linux, else None."""
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
    """Return freed memory to the system and restart the peak of the resident set. False where that is not possible."""
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


def cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)


def machine(threads: int | None = None) -> dict[str, Any]:
    """Facts about this machine. `threads` sets torch's number of threads first, for later processes as well."""
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
        "load_average": round(os.getloadavg()[0], 2),  # above the number of cores, times are not reliable
        "versions": package_versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def finish(
    name: str, measured: Sequence[Measured], options: Mapping[str, Any], *, threads: int | None = None,
    out: Path | None = None, columns: Mapping[str, Callable[[float], str]] | None = None,
    targets: Sequence[Target] = (),
) -> dict[str, Any]:  # fmt: skip
    """Print a Markdown table; returns everything as plain values, and writes them to `out` as JSON.

    Args:
        name: the benchmark.
        measured: one row per variant.
        options: shown above the table.
        threads: CPU threads.
        out: a JSON file.
        columns: figure -> how to show it, for the figures that belong in the table.
        targets: shown below the table.
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
        "variants": [one.row() for one in measured],
        **({"targets": [{**asdict(target), "met": target.met} for target in targets]} if targets else {}),
    }
    table = Table(box=MARKDOWN)
    for column in ("variant", "median", "min - max", "ratio", "peak memory", *(columns or {}), "note"):
        table.add_column(column, justify="left" if column in ("variant", "note") else "right", overflow="fold")
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
    for target in targets:
        console.print(str(target))
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
    """Whether `error` says that memory ran out."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
