"""Another checkpoint as the reference: a second model beside the policy, sharded on its own under ZeRO-3."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ema_scale.core.errors import UserError
from ema_scale.models.hooks import capture, reference_pass
from ema_scale.models.layout import ModelLayout
from ema_scale.models.sharding import full_shape, shard_frozen, uses_fsdp
from ema_scale.reference.base import HiddenStates, LayerReader, Reference, for_attention, wanted
from ema_scale.reference.hidden_state_store import RowKeys


class Separate(Reference):
    """Two models, two heads. Call `prepare` once, when the policy has been prepared; `prepared` is true from then on.

    The heads may pad the vocabulary to different sizes: loss terms are over the tokens that both have.
    """

    name: ClassVar[str] = "separate"

    def __init__(self, layout: ModelLayout, model: Any) -> None:
        super().__init__(layout)
        self.prepared = False
        self.model = model.eval().requires_grad_(False)
        self._head_layout = ModelLayout.of(model, adapters=False)
        self._head_layout.make_leaves()
        # The whole model is called, so that ZeRO-3's and FSDP2's hooks on it run. Its head is left out: the loss
        # applies it chunk by chunk.
        self._original, model.forward = model.forward, self._last_states

    def with_logits(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The model's own logits [B, T, V] and last hidden states [B, T, H]."""
        logits, states = self.model(**inputs, with_logits=True)
        return logits, states

    def _last_states(self, with_logits: bool = False, **inputs: Any) -> Any:
        if with_logits:
            return self._original(**inputs).logits, self._last_states(**inputs)
        output = self.head_layout.backbone(**{**for_attention(inputs), "use_cache": False})
        return output[0] if isinstance(output, tuple) else output.last_hidden_state

    @property
    def head_layout(self) -> ModelLayout:
        return self._head_layout

    @property
    def same_shape(self) -> bool:
        policy, reference = self._shapes()
        return policy == reference

    def check_vocabulary(self, tokens: int) -> None:
        """Raises UserError if a head lacks some of the tokenizer's tokens, whose ids are below `tokens`."""
        for field, layout in (("reference.model", self.head_layout), ("model", self.layout)):
            rows = full_shape(layout.head_parameters[0])[0]
            if rows < tokens:
                raise UserError(f"{field}: found a head over {rows} tokens, expected the tokenizer's {tokens}")

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises UserError unless states after these layers of both models can be compared."""
        policy, reference = self._shapes()
        if layers and policy != reference:
            raise UserError(
                "a penalty on hidden states needs a reference of the policy's shape: found hidden size "
                f"{reference[0]} and {reference[1]} layers, expected {policy[0]} and {policy[1]}"
            )

    def _shapes(self) -> list[tuple[int, int]]:
        """(hidden size, decoder layers) of policy and reference."""
        both = (self.layout, self.head_layout)
        return [(layout.core.config.get_text_config().hidden_size, len(layout.layers)) for layout in both]

    def prepare(self, accelerator: Any) -> None:
        """Put the model on the device. Under ZeRO-3: into an engine of its own, which shards it and trains nothing;
        under FSDP2: shard it by layer. A collective."""
        from transformers.integrations import is_deepspeed_zero3_enabled

        self.prepared = True
        if uses_fsdp():
            shard_frozen(self.model, self.head_layout.layers)
            return
        if not is_deepspeed_zero3_enabled():
            self.model.to(accelerator.device)
            return
        import deepspeed

        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        for key in ("optimizer", "scheduler"):
            config.pop(key, None)
        deepspeed.initialize(model=self.model, config=config)
        self.model.eval()

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
            captured = capture(self.head_layout.layers, wanted(layers, reader), reference_layers.__setitem__)
            with self.timed(), torch.no_grad(), reference_pass(), captured:
                last = self.model(**inputs)
        states = self.run_policy(inputs, layers, reader, lambda layer, _: reference_layers.pop(layer, None))
        states.reference = last
        return states


def check_tokenizer(policy: Any, reference: Any, where: str) -> None:
    """Raises UserError unless both tokenizers give every token the same id: there is no divergence between
    distributions over different tokens."""
    expected, found = policy.get_vocab(), reference.get_vocab()
    for token in sorted({*expected, *found}, key=lambda t: (expected.get(t, found.get(t)), t)):
        if expected.get(token) != found.get(token):
            ids = [vocabulary.get(token, "nothing") for vocabulary in (found, expected)]
            raise UserError(
                f"reference.model: {where} has another tokenizer: for {token!r} found {ids[0]}, expected {ids[1]}"
            )
