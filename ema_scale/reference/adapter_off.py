"""The reference as a second forward of the same weights, adapters off: no second copy, sharded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ema_scale.models.hooks import capture, reference_pass
from ema_scale.reference.base import HiddenStates, Keep, Reference


class AdapterOff(Reference):
    """Two forwards. The reference goes first: under ZeRO-3, a module's last forward decides when its
    parameters are released, and that must be the one that has a backward.
    """

    name: ClassVar[str] = "adapter_off"

    def streams(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int] = (),
        *,
        reference: bool = True,
        keep: Keep | None = None,
    ) -> HiddenStates:
        seen: dict[int, Tensor] = {}
        last = self.reference_alone(inputs, layers, seen) if reference else None
        states = self.policy(inputs, layers, lambda layer, _: seen.pop(layer, None), keep)
        states.reference = last
        return states

    @torch.no_grad()
    def reference_alone(self, inputs: dict[str, Any], layers: Sequence[int], seen: dict[int, Tensor]) -> Tensor:
        """The reference's last hidden states [B, T, H]; those of `layers` go into `seen`."""
        with (
            self.timed(),
            self.anatomy.frozen(),
            reference_pass(),
            capture(self.anatomy.layers, layers, seen.__setitem__),
        ):
            return self.backbone(inputs)
