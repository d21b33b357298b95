"""`ema bench loss`, `step` and `reference`: what the reference costs in training."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.bench import Out, Repeats, Threads, bench
from ema_scale.errors import UserError

Model = Annotated[str, typer.Option(help="a shape: small, qwen2.5-0.5b, ... llama-3.1-70b")]
Layers = Annotated[int | None, typer.Option(min=1, help="cut to so many")]
Length = Annotated[int, typer.Option(min=2, help="tokens a row")]
Checkpointing = Annotated[bool, typer.Option(help="of gradients")]
Strength = Annotated[float, typer.Option(min=0, help="0: without")]
Ways = Annotated[list[str] | None, typer.Option("--way", help="only plain and these (the first words are enough)")]
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


@bench.command("loss")
def loss_(
    tokens: Annotated[int, typer.Option(min=1)] = 2048,
    vocab: Annotated[int, typer.Option(min=2)] = 32_000,
    hidden: Annotated[int, typer.Option(min=1)] = 512,
    dtype: Dtype = Dtype.float32,
    direction: Direction = Direction.policy_reference,
    device: Device = Device.cpu,
    full: Annotated[
        bool, typer.Option("--full", help="8,192 tokens of Qwen2.5-7B's head in bfloat16, each way once, alone")
    ] = False,
    out: Out = None,
    repeats: Repeats = 5,
    threads: Threads = 1,
) -> None:
    """Cross-entropy + KL by full logits, by Liger and fused: time, peak memory, error to float64."""
    from ema_scale.bench.harness import finish, machine
    from ema_scale.bench.loss import FULL, Shape, bench_loss

    machine(threads)
    shape = Shape(tokens, vocab, hidden, dtype.value, direction.value, device.value)
    if full:
        shape = replace(FULL, direction=direction.value, device=device.value)
    measured, bars = bench_loss(shape, repeats=repeats, each_alone=full)
    shown = ["error", *(name for one in measured[:1] for name in one.figures if name.startswith("value"))]
    columns = {"cpu": lambda v: f"{v:.2f} s of CPU", **{name: lambda v: f"{v:.1e}" for name in shown}}
    finish("loss", measured, vars(shape), threads=threads, out=out, columns=columns, bars=bars)


@bench.command("step")
def step_(
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, typer.Option(min=1, help="a step")] = 2,
    length: Length = 128,
    steps: Annotated[int, typer.Option(min=1, help="timed steps a repeat")] = 5,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    checkpointing: Checkpointing = True,
    kl: Strength = 0.1,
    ldifs: Strength = 0.1,
    way: Ways = None,
    out: Out = None,
    repeats: Repeats = 3,
    threads: Threads = 1,
) -> None:
    """A LoRA step with KL + LDIFS by every way to run the reference, against plain fine-tuning: time, peak memory."""
    from ema_scale.bench.harness import finish, machine, seconds
    from ema_scale.bench.phases import PHASES
    from ema_scale.bench.step import bench_step
    from ema_scale.bench.training_ways import WAYS, Task, chosen

    machine(threads)
    task = Task(model, layers, rows, length, steps, dtype.value, device.value, checkpointing, kl, ldifs)
    measured, bars, floor = bench_step(task, repeats=repeats, ways=chosen(way, WAYS))
    columns = {
        "cpu": lambda v: f"{v:.2f}x",
        "memory": lambda v: f"{v:.2f}x",
        "reference": lambda v: f"{v:.0%} of the time",
        **dict.fromkeys(PHASES, seconds),
    }
    options = {**task.shown(), "arithmetic floor": f"{floor:.2f}x"}
    finish("step", measured, options, threads=threads, out=out, columns=columns, bars=bars)


@bench.command("reference")
def reference_(
    processes: Annotated[int, typer.Option(min=2)] = 2,
    deepspeed: Annotated[str, typer.Option(help="a ZeRO config; none: DDP")] = ZERO3_CPU,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="FSDP2 in place of ZeRO-3")] = False,
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, typer.Option(min=1, help="a step and process")] = 1,
    length: Length = 128,
    steps: Annotated[int, typer.Option(min=1, help="timed")] = 3,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    checkpointing: Checkpointing = True,
    kl: Strength = 0.1,
    ldifs: Strength = 0.1,
    way: Ways = None,
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """Bytes gathered and reduced in a step of KL + LDIFS on several processes, by every way to run the reference; time,
    memory."""
    from ema_scale.bench.harness import finish, machine, mebibytes
    from ema_scale.bench.reference import WAYS, bench_reference
    from ema_scale.bench.training_ways import Task, chosen

    machine(threads)
    task = Task(model, layers, rows, length, steps, dtype.value, device.value, checkpointing, kl, ldifs)
    if fsdp:
        task = replace(task, fsdp=True)
    elif deepspeed != "none":
        task = replace(task, deepspeed=str(_config(deepspeed)))
    measured, bars = bench_reference(task, processes=processes, ways=chosen(way, WAYS))
    columns = {
        "gathered": lambda v: f"{mebibytes(v)} gathered",
        "traffic": lambda v: f"{v:.2f}x",
        "calls": lambda v: f"{v:.0f} calls",
        "reduced": lambda v: f"{mebibytes(v)} reduced",
        "memory": lambda v: f"{v:.2f}x",
        "reference": lambda v: f"{v:.0%} of the time",
    }
    finish("reference", measured, {"processes": processes, **task.shown()}, threads=threads, out=out, columns=columns,
           bars=bars)  # fmt: skip


def _config(name: str) -> Path:
    """A DeepSpeed config, where it says or in the checkout that this package runs from."""
    beside = Path(__file__).resolve().parents[2] / name
    for path in (Path(name), beside):
        if path.is_file():
            return path
    raise UserError(
        f"--deepspeed: no file {name} in {Path.cwd()} or beside the package; expected a DeepSpeed JSON config, such as "
        "launch/deepspeed/zero3_cpu.json of the repository, or none for DDP"
    )
