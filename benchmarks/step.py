"""A training step of KL + LDIFS with each kind of reference, against plain fine-tuning: time and peak memory."""

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
from benchmarks.training_variants import CACHED, DRIFT, PLAIN, TWO, UNDEFENDED, VARIANTS, WITH, Task, Trained, train
from ema_scale.config.sections import TrainingRecipe
from ema_scale.core.errors import UserError

log = logging.getLogger(__name__)
TWO_STREAM_LIMIT, CACHED_LIMIT, MEMORY_LIMIT, DRIFT_LIMIT = 1.40, 1.10, 1.10, 0.01
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of losses


def bench_step(
    task: Task, *, repeats: int, variants: tuple[str, ...] = VARIANTS
) -> tuple[list[Measured], list[Target]]:
    """Run all variants in turn, `repeats` times: `task.steps` timed steps of a newly built model each time.

    Memory is measured in one process per variant. Returns rows and targets. Figures: `floor`, see there; `memory`,
    ratio to plain; `reference`, the share of time that its hidden states take; `PHASES`, seconds per step; on a CPU
    `cpu`, the ratio of processor seconds, which other load disturbs less than elapsed time: there the targets use it.
    Raises UserError if losses differ.
    """
    measured = {variant: Measured(variant) for variant in variants}
    shares: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {variant: [] for variant in variants}
    phases: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as cache, patch.dict(os.environ, EMA_CACHE=cache):
        for _ in range(repeats):
            done = {}
            for variant in variants:
                if not measured[variant].note:
                    log.info("%s", variant)
                    done[variant] = _attempt(variant, task)
            for variant, trained in done.items():
                if trained is None:
                    measured[variant] = Measured(variant, note=OUT_OF_MEMORY)
                    continue
                measured[variant].seconds += trained.seconds
                cpu[variant] += trained.cpu
                phases[variant] += trained.phases
                if trained.reference is not None:
                    shares.setdefault(variant, []).append(trained.reference)
            check_losses(
                {variant: trained.losses for variant, trained in done.items() if trained is not None}, task.dtype
            )
        for variant in variants:
            found = alone("benchmarks.training_variants:measure", variant=variant, task=task.to_dict(), cache=cache)
            measured[variant].peak_bytes = found["peak_bytes"] if found else None
    base = measured[PLAIN]
    for variant, one in measured.items():
        for name in phases[variant][0] if phases[variant] else ():
            one.figures[name] = statistics.median(step[name] for step in phases[variant])
        if variant in shares:
            one.figures["reference"] = statistics.median(shares[variant])
        if one.peak_bytes and base.peak_bytes:
            one.figures["memory"] = one.peak_bytes / base.peak_bytes
        if not variant.startswith(WITH):
            one.figures["floor"] = floor(variant, task)
        if cpu[variant] and cpu[PLAIN] and task.device == "cpu":
            one.figures["cpu"] = statistics.median(cpu[variant]) / statistics.median(cpu[PLAIN])
    add_ratios(list(measured.values()), PLAIN)
    return list(measured.values()), _targets(measured)


def check_losses(losses: dict[str, list[float]], dtype: str) -> None:
    """Raises UserError unless all variants with defenses trained on one loss, and all without on one.

    Those with a defense of their own have a loss of their own.
    """
    losses = {variant: found for variant, found in losses.items() if not variant.startswith(WITH)}
    for group in ([w for w in losses if w in UNDEFENDED], [w for w in losses if w not in UNDEFENDED]):
        for variant in group[1:]:
            for step, (a, b) in enumerate(zip(losses[group[0]], losses[variant], strict=True), start=1):
                if not abs(a - b) <= TOLERANCE[dtype] * abs(a):
                    raise UserError(
                        f"step {step}: the loss of {group[0]!r} is {a:.6g}, and that of {variant!r} {b:.6g}"
                    )


def operations(variant: str, task: Task) -> dict[str, float]:
    """Operations per token, by `models.flops`: `done` in a step, the reference's and checkpointing's in it; `useful`,
    for MFU: the policy's alone; `plain`: done in plain fine-tuning.

    Plain needs logits for the learned half of the tokens, a divergence for all of them, of both models. Where it is
    only measured, the other half's logits get no gradient.
    """
    from peft import get_peft_model

    from benchmarks.random_model import random_base
    from ema_scale.config.sections import AdapterRecipe
    from ema_scale.models.flops import flops
    from ema_scale.models.lora import lora_config

    base = random_base(task.fields, task.dtype, "meta")
    model = get_peft_model(base, lora_config(base, AdapterRecipe()))
    every, half = flops(model, task.length / 2), flops(model, task.length / 2, labelled=0.5)
    again = every.recomputed if task.checkpointing else 0.0
    plain = half.training + again
    done = plain
    if variant == DRIFT:
        done = plain + every.reference + every.head - half.head
    elif variant not in UNDEFENDED:
        reference = every.reference if variant != CACHED else every.head
        done = every.training + again + reference if task.kl else plain + reference - every.head
    return {"done": done, "useful": half.training, "plain": plain}


def floor(variant: str, task: Task) -> float:
    """The ratio to plain fine-tuning that arithmetic alone allows, by counting operations."""
    counted = operations(variant, task)
    return counted["done"] / counted["plain"]


def _attempt(variant: str, task: Task) -> Trained | None:
    try:
        return train(variant, task)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _targets(measured: dict[str, Measured]) -> list[Target]:
    targets = []
    for variant, limit in ((TWO, TWO_STREAM_LIMIT), (CACHED, CACHED_LIMIT)):
        if variant in measured:
            one = measured[variant]
            targets.append(Target(f"time, {variant} of plain", one.figures.get("cpu", one.ratio), limit))
    if DRIFT in measured:
        found = measured[DRIFT].figures.get("cpu", measured[DRIFT].ratio)
        every = TrainingRecipe().drift_every
        share = None if found is None else (found - 1) / every
        targets.append(Target(f"a reading of drift every {every} steps, of the run", share, DRIFT_LIMIT, "{:.2%}"))
    if TWO in measured:
        targets.append(Target(f"memory, {TWO} of plain", measured[TWO].figures.get("memory"), MEMORY_LIMIT))
    return targets
