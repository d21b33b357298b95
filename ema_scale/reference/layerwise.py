"""The reference beside the policy: each decoder layer runs both while its weights are at hand.

Under ZeRO-3 a second forward gathers every layer a second time. Here a layer, gathered once, first runs the
reference's states (no gradient, adapters off), then the policy's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ema_scale.core.collectives import any_rank
from ema_scale.core.errors import UserError
from ema_scale.models.hooks import reference_pass
from ema_scale.models.layout import ModelLayout, adapter_switched, hidden_states_of
from ema_scale.reference.adapter_off import AdapterOff
from ema_scale.reference.base import HiddenStates, Keep, Reference

log = logging.getLogger(__name__)


_FINAL_NORMS = (
    "norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_norm", "embedding_norm"
)  # fmt: skip


class Layerwise(Reference):
    """One pass of the backbone for both streams.

    Decoder layers and the final norm are patched; the patch acts only while `streams` runs, so a
    recomputation under gradient checkpointing, in backward, runs the policy alone. The reference goes first
    in each layer, and the layers are ZeRO-3 leaves: both are needed for one gather a layer.

    The first micro-batch is compared with `AdapterOff`, on every process: an architecture that does more between its
    layers than pass states on is refused, or with fall_back run as `AdapterOff` from then on (`fell_back`), on all
    processes as soon as on one. Build it before the model is prepared. Raises UserError if the final norm is not found.
    """

    name: ClassVar[str] = "two_stream"

    def __init__(self, anatomy: ModelLayout, *, fall_back: bool = False) -> None:
        super().__init__(anatomy)
        norm = _final_norm(anatomy.backbone)
        if norm is None:
            raise UserError(f"{type(anatomy.core).__name__}: found no final norm; use reference: adapter_off")
        self._plain = AdapterOff(anatomy)
        self._plain.watch = self.watch
        self._fall_back = fall_back
        self._checked = False
        self._armed = False
        self._state: Tensor | None = None
        self._wanted: frozenset[int] = frozenset()
        self._seen: dict[int, Tensor] = {}
        self.reference_calls = 0
        self._stages: list[nn.Module] = [*anatomy.layers, norm]
        for index, stage in enumerate(self._stages):
            stage.forward = self._patched(index, stage)

    @staticmethod
    def fits(anatomy: ModelLayout) -> bool:
        """Whether the parts that it needs are where it expects them."""
        return _final_norm(anatomy.backbone) is not None

    def remove(self) -> None:
        """Take the patches off."""
        for stage in self._stages:
            stage.__dict__.pop("forward", None)

    def streams(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int] = (),
        *,
        reference: bool = True,
        keep: Keep | None = None,
    ) -> HiddenStates:
        if not reference or self.fell_back:
            return self._plain.streams(inputs, layers, reference=reference, keep=keep)
        expected = None if self._checked else self._plain.reference_alone(inputs, (), {})
        self._seen, self._wanted, self._state = {}, frozenset(layers), None
        self._armed = True
        try:
            states = self.policy(inputs, layers, self._take, keep)
        finally:
            self._armed = False
        states.reference, self._state = self._state, None
        if expected is not None and not self._check(states.reference, expected):
            return self.streams(inputs, layers, keep=keep)
        return states

    def _take(self, layer: int, state: Tensor) -> Tensor:
        # The embeddings are shared, and passed before the first stage has run.
        return state.detach() if layer == 0 else self._seen.pop(layer)

    # ---- the patch ----

    def _patched(self, index: int, stage: nn.Module) -> Callable[..., Any]:
        original = stage.forward
        tuners = [m for m in stage.modules() if hasattr(m, "_disable_adapters")]
        modules = list(stage.modules())

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            # Before the first layer, a norm may also see the embeddings.
            if self._armed and (index == 0 or self._state is not None):
                if index == 0:  # the embeddings, which both streams share
                    self._state = hidden_states.detach()
                before = self._state
                other = adapter_switched(tuners, modules, self.anatomy.frozen_adapter)
                with self.timed(), torch.no_grad(), other, reference_pass():
                    after = hidden_states_of(original(before, *args, **kwargs))
                self._state = after
                self.reference_calls += 1
                if index + 1 in self._wanted and index < len(self.anatomy.layers):
                    self._seen[index + 1] = after
            return original(hidden_states, *args, **kwargs)

        return forward

    @property
    def fell_back(self) -> bool:
        """Whether it turned out not to fit."""
        return self._checked and self._stages == []

    def _check(self, found: Tensor | None, expected: Tensor) -> bool:
        self._checked = True
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
        difference = float("inf")
        if found is not None and found.shape == expected.shape:
            difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        # One process alone may be over the line, and each way gathers weights another number of times.
        if not any_rank(not difference < tolerance):
            return True
        name = type(self.anatomy.core).__name__
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
