"""`ema bench plan`: what `ema plan` says of memory, held against what is measured."""

from __future__ import annotations

from typing import Annotated

import typer

from ema_scale.cli.bench import Out, Threads, bench
from ema_scale.cli.bench_training import Device, Dtype, Layers, Length, Model


@bench.command("plan")
def plan_(
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, typer.Option(min=1, help="a micro-batch")] = 4,
    length: Length = 128,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """`ema plan`'s memory against the most that torch's allocator gives out in a step, case by case."""
    import tempfile

    from ema_scale.bench.harness import finish, machine, mebibytes
    from ema_scale.bench.plan import bench_plan
    from ema_scale.bench.training_ways import Task

    machine(threads)
    task = Task(model, layers, rows, length, steps=2, dtype=dtype.value, device=device.value)
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as cache:
        measured, bars = bench_plan(task, cache, only=only)
    columns = {"planned": lambda v: f"{mebibytes(v)} planned", "off": lambda v: f"{v:+.1%}"}
    finish("plan", measured, task.shown(), threads=threads, out=out, columns=columns, bars=bars)
