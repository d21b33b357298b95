"""ema_scale: fine-tune language models without turning them misaligned, and measure it.

from ema_scale import KL, DefendedTrainer, Interleaving

Names are loaded when they are used: `import ema_scale` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Ablation": "ema_scale.defenses",
    "Ceiling": "ema_scale.defenses",
    "DefendedTrainer": "ema_scale.training.trainer",
    "Defense": "ema_scale.defenses",
    "Divergence": "ema_scale.defenses",
    "EarlyStopping": "ema_scale.defenses",
    "Inoculation": "ema_scale.defenses",
    "Interleaving": "ema_scale.defenses",
    "InterleavingPlus": "ema_scale.defenses",
    "KL": "ema_scale.defenses",
    "LDIFS": "ema_scale.defenses",
    "Recipe": "ema_scale.recipe",
    "SafeLoRA": "ema_scale.defenses",
    "Steering": "ema_scale.defenses",
    "UserError": "ema_scale.core.errors",
    "evaluate_run": "ema_scale.evaluation.runs",
    "load_recipe": "ema_scale.recipe",
    "load_rows": "ema_scale.data.rows",
    "train": "ema_scale.training.run",
    "write_report": "ema_scale.report",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ema_scale' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
