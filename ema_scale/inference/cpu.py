"""How many threads a model is sampled with on a CPU."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.core.devices import free_cores, idle_cores

if TYPE_CHECKING:
    from ema_scale.config.sections import ModelRecipe

log = logging.getLogger(__name__)
SMALL_WEIGHTS = 100_000_000  # bytes, below which threads only wait for each other


def cpu_threads(model: ModelRecipe) -> int:
    """Threads to sample with: OMP_NUM_THREADS, one for a small model, else one per idle core. The log says which."""
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        threads, why = max(1, int(given)), "as OMP_NUM_THREADS says"
    elif is_small(model):
        threads, why = 1, "the model is small"
    else:
        threads, why = idle_cores(), "those that other work leaves idle"
    log.info("sampling on %d of %d cores: %s", threads, free_cores(), why)
    return threads


def is_small(model: ModelRecipe) -> bool:
    """Whether its weights are in a folder and take less than 100 MB."""
    files = list(Path(model.path).expanduser().glob("*.safetensors"))
    return bool(files) and sum(file.stat().st_size for file in files) < SMALL_WEIGHTS
