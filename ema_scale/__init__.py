"""ema_scale: fine-tune language models without turning them misaligned, and measure it.

from ema_scale import KL, DefendedTrainer, Interleaving

Names are loaded when they are used: `import ema_scale` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ema_scale.core.uri import register

if TYPE_CHECKING:
    from ema_scale.core.errors import UserError
    from ema_scale.data.rows import load_rows
    from ema_scale.defenses import (
        KL,
        LDIFS,
        Ablation,
        Ceiling,
        Defense,
        Divergence,
        EarlyStopping,
        Inoculation,
        Interleaving,
        InterleavingPlus,
        SafeLoRA,
        Steering,
    )
    from ema_scale.recipe import Recipe, load_recipe
    from ema_scale.report.make import write_report
    from ema_scale.study.evaluate import evaluate_run
    from ema_scale.training.run import train
    from ema_scale.training.trainer import DefendedTrainer

__all__ = [
    "KL",
    "LDIFS",
    "Ablation",
    "Ceiling",
    "DefendedTrainer",
    "Defense",
    "Divergence",
    "EarlyStopping",
    "Inoculation",
    "Interleaving",
    "InterleavingPlus",
    "Recipe",
    "SafeLoRA",
    "Steering",
    "UserError",
    "evaluate_run",
    "load_recipe",
    "load_rows",
    "train",
    "write_report",
]

# Every name above that is not a defense, and the module that it comes from.
_MODULES = {
    "DefendedTrainer": "training.trainer",
    "Recipe": "recipe",
    "UserError": "core.errors",
    "evaluate_run": "study.evaluate",
    "load_recipe": "recipe",
    "load_rows": "data.rows",
    "train": "training.run",
    "write_report": "report.make",
}

register("smallworld", "ema_scale.smallworld.scheme")
register("packaged", "ema_scale.models.packaged")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ema_scale' has no attribute {name!r}")
    return getattr(import_module(f"ema_scale.{_MODULES.get(name, 'defenses')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
