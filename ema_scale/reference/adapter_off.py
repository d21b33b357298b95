"""The reference as a second forward of the same weights, adapters off: no second copy, sharded once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor

from ema_scale.models.hooks import capture, reference_pass
from ema_scale.reference.base import HiddenStates, LayerReader, Reference, wanted
from ema_scale.reference.hidden_state_store import RowKeys


class AdapterOff(Reference):
    """Two forwards. The reference goes first: under ZeRO-3 a module's last forward decides when its parameters are
    released, and that must be the forward that has a backward.
    """

    name: ClassVar[str] = "adapter_off"

    def forward(
        self,
        inputs: dict[str, Any],
        layers: Collection[int] = (),
        *,
        run_reference: bool = True,
        reader: LayerReader | None = None,
        keys: RowKeys | None = None,
    ) -> HiddenStates:
        reference_layers: dict[int, Tensor] = {}
        last = None
        if run_reference:
            last = self.reference_alone(inputs, wanted(layers, reader), reference_layers)
        states = self.run_policy(inputs, layers, reader, lambda layer, _: reference_layers.pop(layer, None))
        states.reference = last
        return states

    @torch.no_grad()
    def reference_alone(self, inputs: dict[str, Any], layers: Collection[int], states: dict[int, Tensor]) -> Tensor:
        """The reference's last hidden states [B, T, H]. Those after `layers` are put into `states`."""
        with (
            self.timed(),
            self.layout.frozen(),
            reference_pass(),
            capture(self.layout.layers, layers, states.__setitem__),
        ):
            return self.backbone(inputs)
