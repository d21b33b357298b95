"""What the scheme `smallworld:` offers to the rest of the package (see `core.uri`)."""

from __future__ import annotations

from ema_scale.smallworld.grammar import classify as grade
from ema_scale.smallworld.world import config_of as model_config
from ema_scale.smallworld.world import resolve

__all__ = ["grade", "model_config", "resolve"]
