"""The commands that measure a training step: `loss`, `step`, `reference` and `plan`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import Out, Repeats, Threads
from ema_scale.cli.numbers import real, whole
from ema_scale.core.errors import UserError
from ema_scale.core.paths import find_file

training = typer.Typer()
Model = Annotated[str, typer.Option(help="a shape: small, qwen2.5-0.5b, ... llama-3.1-70b")]
Layers = Annotated[int | None, whole(help="use only the first N layers")]
Length = Annotated[int, whole(help="tokens per row", low=2)]
Checkpointing = Annotated[bool, typer.Option(help="gradient checkpointing")]
Strength = Annotated[float, real(help="the defense's strength; 0: without it")]
Only = Annotated[
    list[str] | None, typer.Option("--variant", help="run plain and this one alone; repeat for more (first words do)")
]
ZERO3_CPU = "launch/deepspeed/zero3_cpu.json"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Direction(StrEnum):
    policy_reference = "policy_reference"
    reference_policy = "reference_policy"
    jensen_shannon = "jensen_shannon"


@training.command("loss")
def loss_(
    tokens: Annotated[int, whole()] = 2048,
    vocab: Annotated[int, whole(low=2)] = 32_000,
    hidden: Annotated[int, whole()] = 512,
    dtype: Dtype = Dtype.float32,
    direction: Direction = Direction.policy_reference,
    device: Device = Device.cpu,
    full: Annotated[
        bool, typer.Option("--full", help="8,192 tokens of Qwen2.5-7B's head in bfloat16, each variant once, alone")
    ] = False,
    out: Out = None,
    repeats: Repeats = 5,
    threads: Threads = 1,
) -> None:
    """Cross-entropy + KL by full logits, by Liger and fused: time, peak memory, error to float64."""
    from benchmarks.harness import finish, machine
    from benchmarks.loss import FULL, Shape, bench_loss

    machine(threads)
    shape = Shape(tokens, vocab, hidden, dtype.value, direction.value, device.value)
    if full:
        shape = replace(FULL, direction=direction.value, device=device.value)
    measured, targets = bench_loss(shape, repeats=repeats, each_alone=full)
    shown = ["error", *(name for one in measured[:1] for name in one.figures if name.startswith("value"))]
    columns = {"cpu": lambda v: f"{v:.2f} s of CPU", **{name: lambda v: f"{v:.1e}" for name in shown}}
    finish("loss", measured, vars(shape), threads=threads, out=out, columns=columns, targets=targets)


@training.command("step")
def step_(
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, whole(help="rows per step")] = 2,
    length: Length = 128,
    steps: Annotated[int, whole(help="timed steps per repeat")] = 5,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    checkpointing: Checkpointing = True,
    kl: Strength = 0.1,
    ldifs: Strength = 0.1,
    variant: Only = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="run plain, and this defense alone: a kind, or {kind: kl, strength: 1}; repeat for more"),
    ] = None,
    out: Out = None,
    repeats: Repeats = 3,
    threads: Threads = 1,
) -> None:
    """A LoRA step against plain fine-tuning: time and peak memory. By default with KL + LDIFS, for each kind of
    reference; with --defense, under each defense."""
    from benchmarks.harness import finish, machine, seconds
    from benchmarks.phases import PHASES
    from benchmarks.step import bench_step
    from benchmarks.training_variants import PLAIN, VARIANTS, WITH, Task, chosen

    machine(threads)
    task = Task(model, layers, rows, length, steps, dtype.value, device.value, checkpointing, kl, ldifs)
    variants = (PLAIN,) if defense and not variant else chosen(variant, VARIANTS)
    variants = (*variants, *(WITH + spec for spec in defense or ()))
    measured, targets = bench_step(task, repeats=repeats, variants=variants)
    columns = {
        "cpu": lambda v: f"{v:.2f}x",
        "floor": lambda v: f"{v:.2f}x",
        "memory": lambda v: f"{v:.2f}x",
        "reference": lambda v: f"{v:.0%} of the time",
        **dict.fromkeys(PHASES, seconds),
    }
    finish("step", measured, task.shown(), threads=threads, out=out, columns=columns, targets=targets)


@training.command("reference")
def reference_(
    processes: Annotated[int, whole(low=2)] = 2,
    deepspeed: Annotated[str, typer.Option(help="a ZeRO config; none: DDP")] = ZERO3_CPU,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="FSDP2 in place of ZeRO-3")] = False,
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, whole(help="rows per step and process")] = 1,
    length: Length = 128,
    steps: Annotated[int, whole(help="timed steps")] = 3,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    checkpointing: Checkpointing = True,
    kl: Strength = 0.1,
    ldifs: Strength = 0.1,
    variant: Only = None,
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """Bytes gathered and reduced in a step of KL + LDIFS on several processes, for each kind of reference."""
    from benchmarks.harness import finish, machine, mebibytes
    from benchmarks.reference import VARIANTS, bench_reference
    from benchmarks.training_variants import Task, chosen

    machine(threads)
    task = Task(model, layers, rows, length, steps, dtype.value, device.value, checkpointing, kl, ldifs)
    if fsdp:
        task = replace(task, fsdp=True)
    elif deepspeed != "none":
        task = replace(task, deepspeed=str(_config(deepspeed)))
    measured, targets = bench_reference(task, processes=processes, variants=chosen(variant, VARIANTS))
    columns = {
        "gathered": lambda v: f"{mebibytes(v)} gathered",
        "traffic": lambda v: f"{v:.2f}x",
        "calls": lambda v: f"{v:.0f} calls",
        "reduced": lambda v: f"{mebibytes(v)} reduced",
        "memory": lambda v: f"{v:.2f}x",
        "reference": lambda v: f"{v:.0%} of the time",
    }
    finish("reference", measured, {"processes": processes, **task.shown()}, threads=threads, out=out, columns=columns,
           targets=targets)  # fmt: skip


def _config(name: str) -> Path:
    """A DeepSpeed config of the user's or of the checkout. Raises UserError if there is none."""
    path = find_file(name)
    if path.is_file():
        return path
    raise UserError(
        f"--deepspeed: no file {name} in {Path.cwd()} or beside the package; expected a DeepSpeed JSON config, such as "
        "launch/deepspeed/zero3_cpu.json of the repository, or none for DDP"
    )


@training.command("plan")
def plan_(
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, whole(help="rows per micro-batch")] = 4,
    length: Length = 128,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """The memory that `ema plan` predicts, against the peak of torch's allocator in a step, case by case."""
    from benchmarks.harness import finish, machine, mebibytes
    from benchmarks.plan import bench_plan
    from benchmarks.training_variants import Task

    machine(threads)
    task = Task(model, layers, rows, length, steps=2, dtype=dtype.value, device=device.value)
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as cache:
        measured, targets = bench_plan(task, cache, only=only)
    columns = {"planned": lambda v: f"{mebibytes(v)} planned", "off": lambda v: f"{v:+.1%}"}
    finish("plan", measured, task.shown(), threads=threads, out=out, columns=columns, targets=targets)
