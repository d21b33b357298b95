"""The reference layer by layer beside the policy: the way that recipes call `two_stream`.

Under ZeRO-3 a second forward gathers every layer a second time. Here each layer is gathered once: it first runs on
the reference's states (no gradient, adapters off), then on the policy's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ema_scale.core.collectives import any_rank
from ema_scale.core.errors import UserError
from ema_scale.models.hooks import reference_pass
from ema_scale.models.layout import ModelLayout, adapter_switched, hidden_states_of
from ema_scale.reference.adapter_off import AdapterOff
from ema_scale.reference.base import HiddenStates, LayerReader, Reference, wanted
from ema_scale.reference.hidden_state_store import RowKeys

log = logging.getLogger(__name__)

_FINAL_NORMS = (
    "norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_norm", "embedding_norm"
)  # fmt: skip


class Layerwise(Reference):
    """One pass of the backbone for policy and reference.

    Decoder layers and the final norm are patched. The patch acts only while `forward` runs, so a recomputation under
    gradient checkpointing, in backward, runs the policy alone. The reference goes first in each layer, and the layers
    are ZeRO-3 leaves: both are needed for one gather per layer.

    The first micro-batch is compared with `AdapterOff`, on every process. An architecture that does more between its
    layers than pass states on is refused. With `fall_back` it is run as `AdapterOff` from then on (`fell_back`), on all
    processes as soon as on one. Build it before the model is prepared. Raises UserError if the final norm is not found.
    """

    name: ClassVar[str] = "two_stream"

    def __init__(self, layout: ModelLayout, *, fall_back: bool = False) -> None:
        super().__init__(layout)
        norm = _final_norm(layout.backbone)
        if norm is None:
            raise UserError(f"{type(layout.core).__name__}: found no final norm; use reference: adapter_off")
        self._adapter_off = AdapterOff(layout)
        self._adapter_off.watch = self.watch
        self._fall_back = fall_back
        self._checked = False
        self._armed = False
        self._state: Tensor | None = None
        self._wanted: frozenset[int] = frozenset()
        self._reference_layers: dict[int, Tensor] = {}
        self.reference_calls = 0
        self._stages: list[nn.Module] = [*layout.layers, norm]
        for index, stage in enumerate(self._stages):
            stage.forward = self._patched(index, stage)

    @staticmethod
    def fits(layout: ModelLayout) -> bool:
        """Whether the model's parts are where this way expects them."""
        return _final_norm(layout.backbone) is not None

    @property
    def fell_back(self) -> bool:
        """Whether the first micro-batch showed that the model does not fit."""
        return self._checked and self._stages == []

    def remove(self) -> None:
        """Take the patches off."""
        for stage in self._stages:
            stage.__dict__.pop("forward", None)

    def forward(
        self,
        inputs: dict[str, Any],
        layers: Collection[int] = (),
        *,
        run_reference: bool = True,
        reader: LayerReader | None = None,
        keys: RowKeys | None = None,
    ) -> HiddenStates:
        if not run_reference or self.fell_back:
            return self._adapter_off.forward(inputs, layers, run_reference=run_reference, reader=reader)
        expected = None if self._checked else self._adapter_off.reference_alone(inputs, (), {})
        self._reference_layers, self._wanted, self._state = {}, frozenset(wanted(layers, reader)), None
        self._armed = True
        try:
            states = self.run_policy(inputs, layers, reader, self._reference_at)
        finally:
            self._armed = False
        states.reference, self._state = self._state, None
        if expected is not None and not self._check(states.reference, expected):
            return self.forward(inputs, layers, reader=reader)
        return states

    def _reference_at(self, layer: int, policy: Tensor) -> Tensor:
        # Policy and reference share the embeddings, which come before the first stage.
        return policy.detach() if layer == 0 else self._reference_layers.pop(layer)

    def _patched(self, index: int, stage: nn.Module) -> Callable[..., Any]:
        original = stage.forward
        tuners = [m for m in stage.modules() if hasattr(m, "_disable_adapters")]
        modules = list(stage.modules())

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            # Before the first layer, a norm may also see the embeddings.
            if self._armed and (index == 0 or self._state is not None):
                if index == 0:  # the embeddings, which both share
                    self._state = hidden_states.detach()
                before = self._state
                switched = adapter_switched(tuners, modules, self.layout.frozen_adapter)
                with self.timed(), torch.no_grad(), switched, reference_pass():
                    after = hidden_states_of(original(before, *args, **kwargs))
                self._state = after
                self.reference_calls += 1
                if index + 1 in self._wanted and index < len(self.layout.layers):
                    self._reference_layers[index + 1] = after
            return original(hidden_states, *args, **kwargs)

        return forward

    def _check(self, found: Tensor | None, expected: Tensor) -> bool:
        self._checked = True
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
        difference = float("inf")
        if found is not None and found.shape == expected.shape:
            difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        # If one process fell back alone, it would gather weights more often than the others, and deadlock.
        if not any_rank(not difference < tolerance):
            return True
        name = type(self.layout.core).__name__
        if not self._fall_back:
            raise UserError(
                f"{name}: its reference beside the policy is not the base model (relative difference "
                f"{difference:.2g}); use reference: adapter_off"
            )
        if not difference < tolerance:
            log.warning("%s: two_stream is not exact (%.2g); using adapter_off", name, difference)
        self.remove()
        self._stages = []
        return False


def _final_norm(backbone: nn.Module) -> nn.Module | None:
    children = dict(backbone.named_children())
    return next((children[name] for name in _FINAL_NORMS if name in children), None)
