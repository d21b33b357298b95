"""A training step of KL + LDIFS by every way to run the reference, beside plain fine-tuning: time and peak memory."""

from __future__ import annotations

import gc
import logging
import os
import statistics
import tempfile
from unittest.mock import patch

import torch

from benchmarks.alone import OUT_OF_MEMORY, alone
from benchmarks.harness import Measured, Target, add_ratios, out_of_memory
from benchmarks.training_ways import CACHED, PLAIN, TWO, UNDEFENDED, WAYS, Task, Trained, train
from ema_scale.core.errors import UserError

log = logging.getLogger(__name__)


TWO_STREAM_BAR, CACHED_BAR, MEMORY_BAR = 1.40, 1.10, 1.10


TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of losses


def bench_step(task: Task, *, repeats: int, ways: tuple[str, ...] = WAYS) -> tuple[list[Measured], list[Target], float]:
    """All ways in turn, `repeats` times, each time `task.steps` timed steps of a model built anew; memory of each in a
    process of its own. Also the arithmetic floor: see `floor`.

    Figures: `memory`, of plain's; `reference`, share of the time that its hidden states take; `PHASES`, seconds of a
    step; on a CPU `cpu`, the ratio of processor seconds, which other work on the machine changes less than the time
    that passes, and by which the bars are read there. Raises UserError if the ways' losses differ.
    """
    measured = {way: Measured(way) for way in ways}
    shares: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    phases: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as cache, patch.dict(os.environ, EMA_CACHE=cache):
        for _ in range(repeats):
            done = {}
            for way in ways:
                if not measured[way].note:
                    log.info("%s", way)
                    done[way] = _attempt(way, task)
            for way, trained in done.items():
                if trained is None:
                    measured[way] = Measured(way, note=OUT_OF_MEMORY)
                    continue
                measured[way].seconds += trained.seconds
                cpu[way] += trained.cpu
                phases[way] += trained.phases
                if trained.reference is not None:
                    shares.setdefault(way, []).append(trained.reference)
            check_losses({way: trained.losses for way, trained in done.items() if trained is not None}, task.dtype)
        for way in ways:
            found = alone("benchmarks.training_ways:measure", way=way, task=task.to_dict(), cache=cache)
            measured[way].peak_bytes = found["peak_bytes"] if found else None
    base = measured[PLAIN]
    for way, one in measured.items():
        for name in phases[way][0] if phases[way] else ():
            one.figures[name] = statistics.median(step[name] for step in phases[way])
        if way in shares:
            one.figures["reference"] = statistics.median(shares[way])
        if one.peak_bytes and base.peak_bytes:
            one.figures["memory"] = one.peak_bytes / base.peak_bytes
        if cpu[way] and cpu[PLAIN] and task.device == "cpu":
            one.figures["cpu"] = statistics.median(cpu[way]) / statistics.median(cpu[PLAIN])
    add_ratios(list(measured.values()), PLAIN)
    return list(measured.values()), _bars(measured), floor(task)


def check_losses(losses: dict[str, list[float]], dtype: str) -> None:
    """Raises UserError unless all ways with defenses trained on one loss, and all without on one."""
    for group in ([w for w in losses if w in UNDEFENDED], [w for w in losses if w not in UNDEFENDED]):
        for way in group[1:]:
            for step, (a, b) in enumerate(zip(losses[group[0]], losses[way], strict=True), start=1):
                if not abs(a - b) <= TOLERANCE[dtype] * abs(a):
                    raise UserError(f"step {step}: the loss of {group[0]!r} is {a:.6g}, and that of {way!r} {b:.6g}")


def floor(task: Task) -> float:
    """By counting operations (`training.flops`): what a step takes with a forward of the reference more, and logits for
    all tokens, over a plain step, with logits for the learned half."""
    from peft import get_peft_model

    from benchmarks.random_model import random_base
    from ema_scale.config.sections import AdapterRecipe
    from ema_scale.models.flops import flops
    from ema_scale.models.lora import lora_config

    base = random_base(task.fields, task.dtype, "meta")
    model = get_peft_model(base, lora_config(base, AdapterRecipe()))
    every, half = flops(model, task.length / 2), flops(model, task.length / 2, labelled=0.5)
    again = every.recomputed if task.checkpointing else 0.0
    return (every.training + every.reference + again) / (half.training + again)


def _attempt(way: str, task: Task) -> Trained | None:
    try:
        return train(way, task)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _bars(measured: dict[str, Measured]) -> list[Target]:
    bars = []
    for way, limit in ((TWO, TWO_STREAM_BAR), (CACHED, CACHED_BAR)):
        if way in measured:
            one = measured[way]
            bars.append(Target(f"time, {way} of plain", one.figures.get("cpu", one.ratio), limit))
    if TWO in measured:
        bars.append(Target(f"memory, {TWO} of plain", measured[TWO].figures.get("memory"), MEMORY_BAR))
    return bars
