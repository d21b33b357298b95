"""What each kind of reference costs on several processes, against plain fine-tuning: bytes moved, time, memory."""

from __future__ import annotations

import logging
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Measured, Target, add_ratios
from benchmarks.random_model import random_base
from benchmarks.step import check_losses
from benchmarks.together import together
from benchmarks.training_variants import CACHED, FORWARDS, OFF, PLAIN, PLAIN_LOGITS, SECOND, TWO, Task
from ema_scale.core.errors import UserError

log = logging.getLogger(__name__)
VARIANTS = (PLAIN_LOGITS, PLAIN, SECOND, FORWARDS, OFF, TWO, CACHED)
BYTES_LIMIT, MEMORY_LIMIT = 1.00, 1.10


def bench_reference(
    task: Task, *, processes: int, variants: tuple[str, ...] = VARIANTS
) -> tuple[list[Measured], list[Target]]:
    """Run each variant in its own processes: under ZeRO by task.deepspeed, under FSDP2 by task.fsdp, else under DDP.

    Figures: `gathered` and `reduced`, bytes per step and process; `calls` of all-gather per step; `traffic`,
    `reduction` and `memory`, ratios to plain fine-tuning; `PHASES`, seconds per step. peak_bytes is the first
    process's, with its share of the weights. Raises UserError if a variant fails, or losses differ.
    """
    measured, losses = [], {}
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        task = replace(task, saved=f"{folder}/model")
        random_base(task.fields, task.dtype, "cpu").save_pretrained(task.saved)
        for variant in variants:
            log.info("%s", variant)
            found = launched("benchmarks.gathered:measure", variant, task, processes, Path(folder))
            losses[variant] = found["losses"]
            figures = {name: found[name] for name in ("gathered", "calls", "reduced")}
            for name in found["phases"][0] if found["phases"] else ():
                figures[name] = statistics.median(step[name] for step in found["phases"])
            if found["reference"] is not None:
                figures["reference"] = found["reference"]
            measured.append(Measured(variant, found["seconds"], found["peak_bytes"], figures=figures))
    check_losses(losses, task.dtype)
    by_name = {one.name: one for one in measured}
    base = by_name[PLAIN]
    for one in measured:
        for ratio, moved in (("traffic", "gathered"), ("reduction", "reduced")):
            if base.figures[moved]:
                one.figures[ratio] = one.figures[moved] / base.figures[moved]
        if one.peak_bytes and base.peak_bytes:
            one.figures["memory"] = one.peak_bytes / base.peak_bytes
    add_ratios(measured, PLAIN)
    targets = []
    for variant in (TWO, CACHED):
        if variant in by_name:
            for ratio, moved in (("traffic", "gathered"), ("reduction", "reduced")):
                if ratio in by_name[variant].figures:
                    targets.append(
                        Target(f"bytes {moved}, {variant} of plain", by_name[variant].figures[ratio], BYTES_LIMIT)
                    )
            targets.append(Target(f"memory, {variant} of plain", by_name[variant].figures.get("memory"), MEMORY_LIMIT))
    return measured, targets


def launched(worker: str, variant: str, task: Task, processes: int, folder: Path) -> dict[str, Any]:
    """What `worker` (module:function) returns in the first of several processes. Raises UserError if one fails."""
    try:
        returned, _ = together(worker, processes, variant, task.to_dict(), EMA_CACHE=str(folder))
    except UserError as error:
        raise UserError(f"{variant}: {error}") from error
    return dict(returned[0])
