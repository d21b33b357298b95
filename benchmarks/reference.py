"""What the reference costs on several processes: bytes gathered and reduced in a step, by every way to run it, beside
plain fine-tuning."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Measured, Target, add_ratios
from benchmarks.random_model import random_base
from benchmarks.step import check_losses
from benchmarks.training_ways import CACHED, FORWARDS, OFF, PLAIN, PLAIN_LOGITS, SECOND, TWO, Task
from ema_scale.core.errors import UserError

log = logging.getLogger(__name__)


WAYS = (PLAIN_LOGITS, PLAIN, SECOND, FORWARDS, OFF, TWO, CACHED)


BYTES_BAR, MEMORY_BAR = 1.00, 1.10


def bench_reference(task: Task, *, processes: int, ways: tuple[str, ...] = WAYS) -> tuple[list[Measured], list[Target]]:
    """Each way in processes of its own. Figures: `gathered` and `reduced`, bytes a step on one process; `calls` of
    all-gather; `traffic`, `reduction` and `memory`, of plain's; `PHASES`, seconds of a step. peak_bytes: of the first
    process, with its share of the weights.

    task.deepspeed: a ZeRO config, or task.fsdp; neither: DDP. Raises UserError if a way fails, or the ways' losses
    differ.
    """
    measured, losses = [], {}
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        task = replace(task, saved=f"{folder}/model")
        random_base(task.fields, task.dtype, "cpu").save_pretrained(task.saved)
        for way in ways:
            log.info("%s", way)
            found = launched("benchmarks.gathered", way, task, processes, Path(folder))
            losses[way] = found["losses"]
            figures = {name: found[name] for name in ("gathered", "calls", "reduced")}
            for name in found["phases"][0] if found["phases"] else ():
                figures[name] = statistics.median(step[name] for step in found["phases"])
            if found["reference"] is not None:
                figures["reference"] = found["reference"]
            measured.append(Measured(way, found["seconds"], found["peak_bytes"], figures=figures))
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
    bars = []
    for way in (TWO, CACHED):
        if way in by_name:
            for ratio, moved in (("traffic", "gathered"), ("reduction", "reduced")):
                if ratio in by_name[way].figures:
                    bars.append(Target(f"bytes {moved}, {way} of plain", by_name[way].figures[ratio], BYTES_BAR))
            bars.append(Target(f"memory, {way} of plain", by_name[way].figures.get("memory"), MEMORY_BAR))
    return measured, bars


def launched(worker: str, way: str, task: Task, processes: int, folder: Path) -> dict[str, Any]:
    """What the first process of the module `worker` writes. Raises UserError if it fails."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        "-m", worker, str(result), way, json.dumps(task.to_dict()),
    ]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1", **os.environ, "EMA_CACHE": str(folder), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode or not result.is_file():
        raise UserError(f"{way}: failed on {processes} processes:\n{(done.stdout + done.stderr)[-3000:]}")
    return dict(json.loads(result.read_text()))
