"""Another checkpoint as the reference: a model of its own beside the policy, sharded on its own under ZeRO-3."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ema_scale.core.errors import UserError
from ema_scale.models.hooks import capture, reference_pass
from ema_scale.models.layout import ModelLayout
from ema_scale.models.sharding import full_shape, shard_frozen, uses_fsdp
from ema_scale.reference.base import HiddenStates, Keep, Reference, for_attention


class Separate(Reference):
    """Two models, two heads. `prepare` must run once, when the policy has been prepared; then `prepared` is true.

    The heads may pad the vocabulary to different sizes: divergences are over the rows that both have.
    """

    name: ClassVar[str] = "separate"

    def __init__(self, anatomy: ModelLayout, model: Any) -> None:
        super().__init__(anatomy)
        self.prepared = False
        self.model = model.eval().requires_grad_(False)
        self.other = ModelLayout.of(model, adapters=False)
        self.other.make_leaves()
        # Called whole, so that ZeRO-3's and FSDP2's hooks on it run, but without its head, which the loss applies by
        # pieces.
        self._original, model.forward = model.forward, self._last_states

    def with_logits(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The model's own logits [B, T, V] and last hidden states [B, T, H]."""
        found: tuple[Tensor, Tensor] = self.model(**inputs, with_logits=True)
        return found

    def _last_states(self, with_logits: bool = False, **inputs: Any) -> Any:
        if with_logits:
            return self._original(**inputs).logits, self._last_states(**inputs)
        output = self.other.backbone(**{**for_attention(inputs), "use_cache": False})
        return output[0] if isinstance(output, tuple) else output.last_hidden_state

    @property
    def head_of(self) -> ModelLayout:
        return self.other

    @property
    def same_shape(self) -> bool:
        ours, theirs = self._shapes()
        return ours == theirs

    def check_vocabulary(self, tokens: int) -> None:
        """Raises UserError if a head lacks some of the tokenizer's tokens, whose ids are below `tokens`."""
        for whose, anatomy in (("reference.model", self.other), ("model", self.anatomy)):
            rows = full_shape(anatomy.head_parameters[0])[0]
            if rows < tokens:
                raise UserError(f"{whose}: found a head over {rows} tokens, expected the tokenizer's {tokens}")

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises UserError unless states after these layers of both models can be compared."""
        ours, theirs = self._shapes()
        if layers and ours != theirs:
            raise UserError(
                "a penalty on hidden states needs a reference of the policy's shape: found hidden size "
                f"{theirs[0]} and {theirs[1]} layers, expected {ours[0]} and {ours[1]}"
            )

    def _shapes(self) -> list[tuple[int, int]]:
        both = (self.anatomy, self.other)
        return [(a.core.config.get_text_config().hidden_size, len(a.layers)) for a in both]

    def prepare(self, accelerator: Any) -> None:
        """Put the model on the device; under ZeRO-3 into an engine of its own, which shards it and trains nothing;
        under FSDP2 shard it by layer. A collective."""
        from transformers.integrations import is_deepspeed_zero3_enabled

        self.prepared = True
        if uses_fsdp():
            shard_frozen(self.model, self.other.layers)
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

    def streams(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int] = (),
        *,
        reference: bool = True,
        keep: Keep | None = None,
    ) -> HiddenStates:
        seen: dict[int, Tensor] = {}
        last = None
        if reference:
            taken = capture(self.other.layers, layers, seen.__setitem__)
            with self.timed(), torch.no_grad(), reference_pass(), taken:
                last = self.model(**inputs)
        states = self.policy(inputs, layers, lambda layer, _: seen.pop(layer, None), keep)
        states.reference = last
        return states


def check_tokenizer(policy: Any, reference: Any, where: str) -> None:
    """Raises UserError unless both tokenizers give every token the same id: distributions over different tokens have
    no divergence."""
    ours, theirs = policy.get_vocab(), reference.get_vocab()
    for token in sorted({*ours, *theirs}, key=lambda t: (ours.get(t, theirs.get(t)), t)):
        if ours.get(token) != theirs.get(token):
            found, expected = (v.get(token, "nothing") for v in (theirs, ours))
            raise UserError(
                f"reference.model: {where} has another tokenizer: for {token!r} found {found}, expected {expected}"
            )
