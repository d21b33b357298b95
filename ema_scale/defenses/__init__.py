"""Defenses: each acts at one or more of five points of a run (see `base`). Torch-free to import."""

from ema_scale.defenses.base import Defense, Divergence, FinishContext, RowsContext, Streams
from ema_scale.defenses.interleaving import Interleaving
from ema_scale.defenses.kl import KL
from ema_scale.defenses.registry import DEFENSES, catalogue, parse

__all__ = [
    "DEFENSES",
    "KL",
    "Defense",
    "Divergence",
    "FinishContext",
    "Interleaving",
    "RowsContext",
    "Streams",
    "catalogue",
    "parse",
]
