"""The frozen reference: the policy with its adapters off. One interface, several ways to run it."""

from __future__ import annotations

from typing import Any

from ema_scale.errors import UserError
from ema_scale.reference.anatomy import Anatomy, Head
from ema_scale.reference.base import Reference, States

__all__ = ["Anatomy", "Head", "Reference", "States", "WAYS", "make_reference"]

WAYS = ("auto", "adapter_off")


def make_reference(way: str, model: Any) -> Reference:
    """The reference of a PeftModel. auto: the fastest exact way this model allows.

    Raises UserError for an unknown way, or a model whose parts it cannot find.
    """
    from ema_scale.reference.adapter_off import AdapterOff

    anatomy = Anatomy.of(model)
    if way in ("auto", "adapter_off"):
        return AdapterOff(anatomy)
    raise UserError(f"reference: found {way!r}, expected one of {', '.join(WAYS)}")
