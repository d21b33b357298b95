"""`ema plan`'s memory against what torch's allocator really gives out in a step, on small models of the same layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ema_scale.bench.alone import alone
from ema_scale.bench.harness import Bar, Measured
from ema_scale.bench.training_ways import CACHED, OFF, PLAIN, SEPARATE, TWO, WARMUP, Task, train
from ema_scale.planning.memory import memory, total
from ema_scale.planning.setup import AUTOCAST, BFLOAT16, FLOAT32, Setup, kept_states, logits_buffers
from ema_scale.planning.shapes import from_config
from ema_scale.recipe import AdapterRecipe

log = logging.getLogger(__name__)

BAR = 0.15
_WAYS = {PLAIN: None, OFF: "adapter_off", TWO: "two_stream", CACHED: "cached", SEPARATE: "separate"}


def cases(task: Task) -> dict[str, tuple[str, Task]]:
    """Name -> (way, task): what changes memory, one after the other. task: with checkpointing, KL and LDIFS."""
    kl, stored = replace(task, ldifs=0.0), replace(task, ldifs=0.0, checkpointing=False)
    half = "bfloat16" if task.dtype == "float32" else "float32"
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
    }


def bench_plan(task: Task, cache: str, *, only: str = "") -> tuple[list[Measured], list[Bar]]:
    """Every case whose name contains `only`, each alone in a process.

    Figures: `planned`, bytes; `off`, by how much that is above what was measured (below it: negative). cache: a folder
    for the cached reference.
    """
    measured, bars = [], []
    for name, (way, case) in cases(task).items():
        if only not in name:
            continue
        log.info("%s", name)
        found = alone("ema_scale.bench.plan:allocated", way=way, task=case.to_dict(), cache=cache)
        if found is None:
            measured.append(Measured(name, note="out of memory"))
            continue
        planned = total(
            [line for line in memory(setup_of_task(way, case), cuda=case.device == "cuda") if line.measured]
        )
        off = planned / found["bytes"] - 1
        measured.append(Measured(name, found["seconds"], found["bytes"], figures={"planned": planned, "off": off}))
        bars.append(Bar(name, abs(off), BAR, "{:.0%}"))
    return measured, bars


def setup_of_task(way: str, task: Task) -> Setup:
    """What `planning.setup_of` makes of a recipe, of a benchmark's task."""
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
        precision=FLOAT32 if task.dtype == "float32" else half,
        way=_WAYS[way],
        other=shape if way == SEPARATE else None,
        states=kept_states(defenses, shape.layers),
        buffers=logits_buffers(defenses, 0),
        masked=False,
        learned=0.5,
    )


def allocated(way: str, task: dict[str, Any], cache: str) -> dict[str, Any]:
    """One way alone in its process: the most bytes of torch's allocator in the steps after the warm-up."""
    import os

    os.environ["EMA_CACHE"] = cache
    asked = Task(**task)
    if asked.device == "cuda":
        done = train(way, asked, torch.cuda.reset_peak_memory_stats)
        return {"bytes": torch.cuda.max_memory_allocated(), "seconds": done.seconds}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    held, steps = 0, 0

    def ended() -> None:
        nonlocal held, steps
        steps += 1
        if steps == WARMUP:
            held = held_bytes()
            profiler.start()
        elif steps == WARMUP + asked.steps:
            profiler.stop()

    done = train(way, asked, ended=ended)
    now = highest = 0
    for change in changes(profiler):
        now += change
        highest = max(highest, now)
    return {"bytes": held + highest, "seconds": done.seconds}


def changes(profiler: Any) -> Iterator[int]:
    """Bytes given out (taken back: negative) by the CPU's allocator, in the order of time."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        yield event.nbytes()


def held_bytes() -> int:
    """Of all tensors that are alive, by the storages they share."""
    import gc

    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
