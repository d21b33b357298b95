"""`ema bench loss`: what the reference costs in training."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from ema_scale.cli.bench import Out, Repeats, Threads, bench


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
    columns = {"error": lambda v: f"{v:.1e}"}
    finish("loss", measured, vars(shape), threads=threads, out=out, columns=columns, bars=bars)
