"""The interface of a reference: hidden states of policy and frozen base for one micro-batch."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ema_scale.core.cuda_timer import Stopwatch
from ema_scale.models.hooks import capture
from ema_scale.models.layout import ModelLayout
from ema_scale.models.sharding import under_zero3

# (layer, policy states, reference states or None) -> whether to store both
Keep = Callable[[int, Tensor, Tensor | None], bool]


@dataclass
class HiddenStates:
    """policy, reference: last hidden states [B, T, H], after the final norm, the reference's without a
    gradient (None if it did not run). policy_layers, reference_layers: layer -> states [B, T, H] (0:
    embeddings, k: after decoder layer k, before the final norm).
    """

    policy: Tensor
    reference: Tensor | None = None
    policy_layers: dict[int, Tensor] = field(default_factory=dict)
    reference_layers: dict[int, Tensor] = field(default_factory=dict)


class Reference(ABC):
    """One way to run policy and reference over a micro-batch, inside the model's own forward.

    watch: time spent on the reference's hidden states, a cache's reading included; not on its logits.
    """

    name: ClassVar[str]

    def __init__(self, anatomy: ModelLayout) -> None:
        self.anatomy = anatomy
        anatomy.make_leaves()
        self.watch = Stopwatch()

    @property
    def same_shape(self) -> bool:
        """Whether hidden states of both can be compared, layer by layer."""
        return True

    @property
    def head_of(self) -> ModelLayout:
        """Whose head turns the reference's last states into logits; the policy's own unless they differ."""
        return self.anatomy

    def timed(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the time goes to `watch`."""
        return self.watch.running(self.anatomy.head_parameters[0].device)

    @abstractmethod
    def streams(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int] = (),
        *,
        reference: bool = True,
        keep: Keep | None = None,
    ) -> HiddenStates:
        """Run the backbone over `inputs` (input_ids, attention_mask, ...) and, if asked, the reference.

        layers: which layers' states to return. keep: called as the policy passes each of them, so that what reads
        them there need not hold all; without it all are stored.
        """

    def backbone(self, inputs: dict[str, Any]) -> Tensor:
        """Last hidden states [B, T, H], after the final norm."""
        output = self.anatomy.backbone(**for_attention(inputs), use_cache=False)
        return output[0] if isinstance(output, tuple) else output.last_hidden_state

    def policy(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int],
        take: Callable[[int, Tensor], Tensor | None],
        keep: Keep | None,
    ) -> HiddenStates:
        """Run the policy. take(layer, policy states) hands over the reference's, once, as the policy passes them; None
        if there are none."""
        mine: dict[int, Tensor] = {}
        theirs: dict[int, Tensor] = {}

        def on_state(layer: int, state: Tensor) -> None:
            base = take(layer, state)
            if keep is None or keep(layer, state, base):
                mine[layer] = state
                if base is not None:
                    theirs[layer] = base

        with capture(self.anatomy.layers, layers, on_state), self._input_gradient():
            return HiddenStates(self.backbone(inputs), None, mine, theirs)

    @contextlib.contextmanager
    def _input_gradient(self) -> Iterator[None]:
        """Under ZeRO-3 a layer's weights are released after its backward, which DeepSpeed recognises by the
        gradient of its input; frozen embeddings would leave the first layer without one, and it would be
        released before its own gradients are stored. The hook comes after DeepSpeed's, so the embeddings get
        no backward.
        """
        if not torch.is_grad_enabled() or not under_zero3(self.anatomy.head_parameters[0]):
            yield
            return

        def require(module: nn.Module, args: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        handle = self.anatomy.core.get_input_embeddings().register_forward_hook(require)
        try:
            yield
        finally:
            handle.remove()


def for_attention(inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` without the mask, if position ids mark packed rows: transformers keeps rows apart only then. Padding
    comes after a row or has positions of its own, so that nothing real attends to it."""
    packed = inputs.get("position_ids") is not None
    return {k: v for k, v in inputs.items() if not (packed and k == "attention_mask")}
