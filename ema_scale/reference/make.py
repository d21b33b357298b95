"""The frozen reference: the policy with its adapters off, or another. One interface, several ways to run it.

Importing the package loads no torch; `choice` needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ema_scale.config.sections import WAYS
from ema_scale.core.errors import UserError

if TYPE_CHECKING:
    from ema_scale.reference.base import Reference


def make_reference(way: str, model: Any, *, sharded: bool = False) -> Reference:
    """A reference of a PeftModel that needs nothing but the model. auto: two_stream where ZeRO-3 shards the model
    (`sharded`) and its architecture allows, else adapter_off.

    Raises UserError for an unknown way, or a model whose parts it cannot find.
    """
    from ema_scale.models.layout import ModelLayout
    from ema_scale.reference.adapter_off import AdapterOff
    from ema_scale.reference.layerwise import Layerwise

    ways = [way for way in WAYS if way != "cached"]
    if way not in ways:
        raise UserError(f"reference: found {way!r}, expected one of {', '.join(ways)}")
    layout = ModelLayout.of(model)
    if way == "two_stream":
        return Layerwise(layout)
    # Where nothing is sharded two forwards cost the same, and touch the model less.
    if way == "auto" and sharded and Layerwise.fits(layout):
        return Layerwise(layout, fall_back=True)
    return AdapterOff(layout)
