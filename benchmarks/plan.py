"""The memory that `ema plan` predicts, against what torch's allocator gives out in a step of a small model."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.alone import alone
from benchmarks.harness import Measured, Target
from benchmarks.random_model import random_base
from benchmarks.reference import launched
from benchmarks.training_variants import CACHED, OFF, PLAIN, SEPARATE, TWO, Task
from ema_scale.config.sections import AdapterRecipe
from ema_scale.planning.memory import memory, total
from ema_scale.planning.model_shapes import from_config
from ema_scale.planning.setup import AUTOCAST, BFLOAT16, Setup, kept_states, logits_buffers, precision_of, read_zero

log = logging.getLogger(__name__)
LIMIT = 0.15
PROCESSES = 2
ZERO3 = "launch/deepspeed/zero3_cpu.json"
_VARIANTS = {PLAIN: None, OFF: "adapter_off", TWO: "two_stream", CACHED: "cached", SEPARATE: "separate"}


def cases(task: Task) -> dict[str, tuple[str, Task]]:
    """Name -> (variant, task). Each case changes one thing; `task` has checkpointing, KL and LDIFS."""
    kl, stored = replace(task, ldifs=0.0), replace(task, ldifs=0.0, checkpointing=False)
    half = "bfloat16" if task.dtype == "float32" else "float32"
    zero3, fsdp = replace(kl, deepspeed=ZERO3), replace(kl, fsdp=True)
    return {
        "plain": (PLAIN, kl),
        "plain, activations stored": (PLAIN, stored),
        "KL, adapter_off": (OFF, kl),
        "KL, two_stream": (TWO, kl),
        "KL, cached": (CACHED, kl),
        "KL, separate": (SEPARATE, kl),
        "KL, activations stored": (OFF, stored),
        "KL + LDIFS": (OFF, task),
        "KL + LDIFS, activations stored": (OFF, replace(stored, ldifs=task.ldifs)),
        f"KL, {half}": (OFF, replace(kl, dtype=half)),
        f"KL, {half}, activations stored": (OFF, replace(stored, dtype=half)),
        "KL, one short row": (OFF, replace(kl, rows=1, length=max(2, task.length // 4))),
        "ZeRO-3, plain": (PLAIN, zero3),
        "ZeRO-3, KL, two_stream": (TWO, zero3),
        "ZeRO-3, KL, cached": (CACHED, zero3),
        "ZeRO-3, KL, two_stream, activations stored": (TWO, replace(zero3, checkpointing=False)),
        "FSDP2, plain": (PLAIN, fsdp),
        "FSDP2, KL, two_stream": (TWO, fsdp),
        "FSDP2, KL, cached": (CACHED, fsdp),
        "FSDP2, KL, two_stream, activations stored": (TWO, replace(fsdp, checkpointing=False)),
    }


def bench_plan(task: Task, cache: str, *, only: str = "") -> tuple[list[Measured], list[Target]]:
    """Measure every case whose name contains `only`.

    Each case has a process to itself; where weights are sharded it has two, and the first is measured.
    Figures: `planned` (bytes) and `off` (planned / measured - 1).

    Args:
        task: the case from which the others differ.
        cache: a folder for the cached reference.
        only: a part of the names of the cases to run.
    """
    measured, targets = [], []
    for name, (variant, case) in cases(task).items():
        if only not in name:
            continue
        log.info("%s", name)
        processes = PROCESSES if case.deepspeed or case.fsdp else 1
        found: dict[str, Any] | None
        if processes > 1:
            found = _on_several(variant, case)
        else:
            found = alone("benchmarks.allocated:allocated", variant=variant, task=case.to_dict(), cache=cache)
        if found is None:
            measured.append(Measured(name, note="out of memory"))
            continue
        lines = memory(setup_of_task(variant, case), processes, cuda=case.device == "cuda")
        planned = total([line for line in lines if line.measured])
        off = planned / found["bytes"] - 1
        measured.append(Measured(name, found["seconds"], found["bytes"], figures={"planned": planned, "off": off}))
        targets.append(Target(name, abs(off), LIMIT, "{:.0%}"))
    return measured, targets


def _on_several(variant: str, case: Task) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        case = replace(case, saved=f"{folder}/model")
        random_base(case.fields, case.dtype, "cpu").save_pretrained(case.saved)
        return launched("benchmarks.allocated:measure", variant, case, PROCESSES, Path(folder))


def setup_of_task(variant: str, task: Task) -> Setup:
    """The setup that `ema plan` computes with, from a benchmark's task."""
    zero = read_zero(task.deepspeed)
    shape, defenses = from_config(task.model, task.fields), [] if variant == PLAIN else task.defenses
    half = AUTOCAST if task.device == "cuda" else BFLOAT16
    return Setup(
        shape,
        batch=task.rows,
        tokens=task.length,
        row_tokens=task.length,
        accumulation=1,
        checkpointing=task.checkpointing,
        rank=AdapterRecipe().r,
        targets=None,
        precision=precision_of(False, zero.stage > 0) if task.dtype == "float32" else half,
        way=_VARIANTS[variant],
        other=shape if variant == SEPARATE else None,
        states=kept_states(defenses, shape.layers),
        buffers=logits_buffers(defenses, 0),
        zero=zero.stage,
        live=zero.live(shape.hidden),
        bucket=zero.bucket(shape.hidden),
        fsdp=task.fsdp,
        masked=False,
        learned=0.5,
    )
