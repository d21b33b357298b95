"""`ema plan`'s memory against what torch's allocator really gives out in a step, on small models of the same layers."""

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
from benchmarks.training_ways import CACHED, OFF, PLAIN, SEPARATE, TWO, Task
from ema_scale.config.sections import AdapterRecipe
from ema_scale.planning.memory import memory, total
from ema_scale.planning.model_shapes import from_config
from ema_scale.planning.setup import AUTOCAST, BFLOAT16, Setup, kept_states, logits_buffers, precision_of, read_zero

log = logging.getLogger(__name__)


BAR = 0.15


PROCESSES = 2


ZERO3 = "launch/deepspeed/zero3_cpu.json"


_WAYS = {PLAIN: None, OFF: "adapter_off", TWO: "two_stream", CACHED: "cached", SEPARATE: "separate"}


def cases(task: Task) -> dict[str, tuple[str, Task]]:
    """Name -> (way, task): what changes memory, one after the other. task: with checkpointing, KL and LDIFS."""
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
    """Every case whose name contains `only`, each alone in a process, or, where weights are sharded, on the first of
    two processes of its own.

    Figures: `planned`, bytes; `off`, by how much that is above what was measured (below it: negative). cache: a folder
    for the cached reference.
    """
    measured, bars = [], []
    for name, (way, case) in cases(task).items():
        if only not in name:
            continue
        log.info("%s", name)
        processes = PROCESSES if case.deepspeed or case.fsdp else 1
        found: dict[str, Any] | None
        if processes > 1:
            found = _on_several(way, case)
        else:
            found = alone("benchmarks.allocated:allocated", way=way, task=case.to_dict(), cache=cache)
        if found is None:
            measured.append(Measured(name, note="out of memory"))
            continue
        lines = memory(setup_of_task(way, case), processes, cuda=case.device == "cuda")
        planned = total([line for line in lines if line.measured])
        off = planned / found["bytes"] - 1
        measured.append(Measured(name, found["seconds"], found["bytes"], figures={"planned": planned, "off": off}))
        bars.append(Target(name, abs(off), BAR, "{:.0%}"))
    return measured, bars


def _on_several(way: str, case: Task) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        case = replace(case, saved=f"{folder}/model")
        random_base(case.fields, case.dtype, "cpu").save_pretrained(case.saved)
        return launched("benchmarks.allocated", way, case, PROCESSES, Path(folder))


def setup_of_task(way: str, task: Task) -> Setup:
    """What `planning.setup_of` makes of a recipe, of a benchmark's task."""
    zero = read_zero(task.deepspeed)
    shape, defenses = from_config(task.model, task.fields), [] if way == PLAIN else task.defenses
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
        way=_WAYS[way],
        other=shape if way == SEPARATE else None,
        states=kept_states(defenses, shape.layers),
        buffers=logits_buffers(defenses, 0),
        zero=zero.stage,
        live=zero.live(shape.hidden),
        bucket=zero.bucket(shape.hidden),
        fsdp=task.fsdp,
        masked=False,
        learned=0.5,
    )
