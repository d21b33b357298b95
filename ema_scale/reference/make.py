"""Make a reference that needs nothing but the policy's own model. Importing this module does not load torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ema_scale.config.sections import WAYS
from ema_scale.core.errors import UserError

if TYPE_CHECKING:
    from ema_scale.reference.base import Reference


def make_reference(way: str, model: Any, *, sharded: bool = False) -> Reference:
    """The reference of a PeftModel.

    way: adapter_off, two_stream, or auto: two_stream if the model is sharded and its architecture allows, else
        adapter_off.
    sharded: whether ZeRO-3 or FSDP2 shards the model.

    Raises UserError for an unknown way, or a model whose parts are not found.
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
    # If nothing is sharded, two forwards cost the same, and patch less of the model.
    if way == "auto" and sharded and Layerwise.fits(layout):
        return Layerwise(layout, fall_back=True)
    return AdapterOff(layout)
