"""The frozen reference: the policy with its adapters off. One interface, several ways to run it."""

from __future__ import annotations

from typing import Any

from ema_scale.errors import UserError
from ema_scale.reference.anatomy import Anatomy, Head
from ema_scale.reference.base import Reference, States

__all__ = ["Anatomy", "Head", "Reference", "States", "WAYS", "make_reference"]

WAYS = ("auto", "adapter_off", "two_stream")


def make_reference(way: str, model: Any, *, sharded: bool = False) -> Reference:
    """The reference of a PeftModel. auto: two_stream where ZeRO-3 shards the model (`sharded`) and
    its architecture allows, else adapter_off.

    Raises UserError for an unknown way, or a model whose parts it cannot find.
    """
    from ema_scale.reference.adapter_off import AdapterOff
    from ema_scale.reference.two_stream import TwoStream

    if way not in WAYS:
        raise UserError(f"reference: found {way!r}, expected one of {', '.join(WAYS)}")
    anatomy = Anatomy.of(model)
    if way == "two_stream":
        return TwoStream(anatomy)
    # Where nothing is sharded two forwards cost the same, and touch the model less.
    if way == "auto" and sharded and TwoStream.fits(anatomy):
        return TwoStream(anatomy, fall_back=True)
    return AdapterOff(anatomy)
