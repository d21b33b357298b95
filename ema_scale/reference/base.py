"""The interface of a reference: hidden states of policy and frozen reference for one micro-batch."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ema_scale.core.cuda_timer import Stopwatch
from ema_scale.models.hooks import capture
from ema_scale.models.layout import ModelLayout
from ema_scale.models.sharding import under_zero3
from ema_scale.reference.hidden_state_store import RowKeys


@dataclass
class HiddenStates:
    """policy, reference: last hidden states [B, T, H], after the final norm. The reference's have no gradient; None if
        it did not run.
    policy_layers, reference_layers: layer -> states [B, T, H] (0: embeddings, k: after decoder layer k, before the
        final norm).
    """

    policy: Tensor
    reference: Tensor | None = None
    policy_layers: dict[int, Tensor] = field(default_factory=dict)
    reference_layers: dict[int, Tensor] = field(default_factory=dict)


class LayerReader(Protocol):
    """Reads hidden states while the policy's forward pass is at their layer, so that nobody has to store them."""

    @property
    def layers(self) -> Collection[int]:
        """The layers to be read (0: embeddings)."""

    def read(self, layer: int, policy: Tensor, reference: Tensor) -> None:
        """Called once per layer, in the order of the forward pass. policy, reference: states [B, T, H]."""


class Reference(ABC):
    """One way to run policy and reference over a micro-batch, inside the model's own forward.

    watch: time spent on the reference's hidden states, reading a cache included; not on its logits.
    """

    name: ClassVar[str]

    def __init__(self, layout: ModelLayout) -> None:
        self.layout = layout
        layout.make_leaves()
        self.watch = Stopwatch()

    @property
    def same_shape(self) -> bool:
        """Whether hidden states of policy and reference can be compared, layer by layer."""
        return True

    @property
    def head_layout(self) -> ModelLayout:
        """The model whose head turns the reference's last states into logits: the policy's, unless they differ."""
        return self.layout

    def timed(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the time goes to `watch`."""
        return self.watch.running(self.layout.head_parameters[0].device)

    @abstractmethod
    def forward(
        self,
        inputs: dict[str, Any],
        layers: Collection[int] = (),
        *,
        run_reference: bool = True,
        reader: LayerReader | None = None,
        keys: RowKeys | None = None,
    ) -> HiddenStates:
        """Run the policy's backbone over a micro-batch and, if `run_reference`, the reference.

        inputs: input_ids, attention_mask, position_ids.
        layers: whose hidden states to return.
        reader: reads further layers while the policy passes them.
        keys: where a cache finds the rows of the batch. None: worked out from the inputs, if needed.
        """

    def backbone(self, inputs: dict[str, Any]) -> Tensor:
        """Last hidden states [B, T, H], after the final norm."""
        output = self.layout.backbone(**for_attention(inputs), use_cache=False)
        return output[0] if isinstance(output, tuple) else output.last_hidden_state

    def run_policy(
        self,
        inputs: dict[str, Any],
        layers: Collection[int],
        reader: LayerReader | None,
        reference_at: Callable[[int, Tensor], Tensor | None],
    ) -> HiddenStates:
        """Run the policy; the result's `reference` is not set yet.

        reference_at: (layer, policy states) -> the reference's states, or None if there are none. Called once per
            layer, when the policy passes it.
        """
        policy_layers: dict[int, Tensor] = {}
        reference_layers: dict[int, Tensor] = {}

        def on_state(layer: int, policy: Tensor) -> None:
            reference = reference_at(layer, policy)
            if reader is not None and reference is not None and layer in reader.layers:
                reader.read(layer, policy, reference)
            if layer in layers:
                policy_layers[layer] = policy
                if reference is not None:
                    reference_layers[layer] = reference

        with capture(self.layout.layers, wanted(layers, reader), on_state), self._input_gradient():
            return HiddenStates(self.backbone(inputs), None, policy_layers, reference_layers)

    @contextlib.contextmanager
    def _input_gradient(self) -> Iterator[None]:
        """Give the decoder layers' input a gradient under ZeRO-3.

        DeepSpeed recognises the end of a layer's backward by the gradient of its input, and then releases its weights.
        Frozen embeddings would leave the first layer without one, and its weights would be released before its own
        gradients are stored. The hook comes after DeepSpeed's, so the embeddings get no backward.
        """
        if not torch.is_grad_enabled() or not under_zero3(self.layout.head_parameters[0]):
            yield
            return

        def require(module: nn.Module, args: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        handle = self.layout.core.get_input_embeddings().register_forward_hook(require)
        try:
            yield
        finally:
            handle.remove()


def wanted(layers: Collection[int], reader: LayerReader | None) -> list[int]:
    """All layers whose states are returned or read, in order."""
    return sorted({*layers, *(reader.layers if reader is not None else ())})


def for_attention(inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` without the mask, if position ids mark packed rows: transformers keeps rows apart only then.

    Padding comes after a row or has positions of its own, so that nothing real attends to it.
    """
    packed = inputs.get("position_ids") is not None
    return {k: v for k, v in inputs.items() if not (packed and k == "attention_mask")}
