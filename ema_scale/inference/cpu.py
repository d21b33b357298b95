"""How a model is sampled on a CPU: threads and dtype."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.core.devices import free_cores, has_bfloat16, idle_cores

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


def cpu_dtype(model: ModelRecipe) -> str:
    """float32, or bfloat16 where the CPU computes in it, unless the checkpoint is in float32 itself.

    Raises UserError if there is no such model.
    """
    from ema_scale.inference.chat_prompts import load_config

    config = load_config(model).get_text_config()
    own = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    return "bfloat16" if own in ("bfloat16", "float16") and has_bfloat16() else "float32"
