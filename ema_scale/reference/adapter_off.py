"""The reference as a second forward of the same weights, adapters off: no second copy, sharded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ema_scale.defenses.base import reference_pass
from ema_scale.reference.base import Keep, Reference, States, capture


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
    ) -> States:
        stack = self.anatomy.layers
        self.reference_so_far = {}
        last = None
        if reference:
            with (
                torch.no_grad(),
                self.anatomy.frozen(),
                reference_pass(),
                capture(stack, layers, self.reference_so_far.__setitem__),
            ):
                last = self._backbone(inputs)
        kept: dict[int, Tensor] = {}

        def on_state(layer: int, state: Tensor) -> None:
            result = keep(layer, state) if keep else state
            if result is not None:
                kept[layer] = result

        with capture(stack, layers, on_state):
            policy = self._backbone(inputs)
        return States(policy, last, kept, self.reference_so_far)

    def _backbone(self, inputs: dict[str, Any]) -> Tensor:
        output = self.anatomy.backbone(**inputs, use_cache=False)
        return output[0] if isinstance(output, tuple) else output.last_hidden_state
