"""Keys and values of the tokens before a conversation's first text, under the policy and under the frozen reference."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ema_scale.core.errors import UserError
from ema_scale.models.hooks import in_reference_pass, reference_pass, unchanged_when_saved
from ema_scale.models.layout import ModelLayout


def leading(mask: Tensor, positions: Tensor | None = None) -> Tensor:
    """bool [B, T]: where `mask` holds and held at every earlier position of the same row.

    positions: position ids of packed rows.
    """
    if positions is None:
        return mask.long().cumprod(1).bool()
    misses = (~mask).long().cumsum(1)
    first = torch.arange(mask.shape[1], device=mask.device) - positions
    before = (misses - (~mask).long()).gather(1, first)
    return misses == before


@dataclass(frozen=True)
class Projection:
    """Keys or values of one layer at n prefix tokens of a micro-batch.

    policy: [n, width], with a gradient. reference: [n, width], without.
    """

    policy: Tensor
    reference: Tensor


class PrefixReader:
    """Reads the outputs of all k_proj and v_proj at the prefix, while the policy runs in training.

    The prefix is the longest one of the first micro-batch; it is run once through the frozen reference, on its own: it
    does not depend on what follows. Rows that begin otherwise count as far as they agree with it. Nothing is gathered
    for it, and no further pass of the policy is made. Recomputation under gradient checkpointing reads nothing.

    prefix: int64 [P], token ids; None before the first micro-batch.

    Raises UserError for a model without k_proj and v_proj.
    """

    def __init__(self, model: Any, scope: Any) -> None:
        """scope: the token set of the prefix, as the trainer's loss request holds its mask."""
        self.scope = scope
        self.layout = ModelLayout.of(model)
        self.modules = [module for layer in self.layout.layers for module in _projections(layer)]
        if not self.modules:
            name = type(self.layout.core).__name__
            raise UserError(f"treft: {name} has no layers k_proj and v_proj, whose outputs it holds; use kl or ldifs")
        self.prefix: Tensor | None = None
        self._reference: dict[int, Tensor] = {}
        self._policy: dict[int, Tensor] = {}
        self._places: Tensor | None = None  # of prefix tokens in the flattened micro-batch
        self._in_prefix: Tensor | None = None  # where in the prefix they stand
        self._filling = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The model's forward is wrapped, not hooked: what is run once must precede everybody's hooks on its layers."""
        core, original = self.layout.core, self.layout.core.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._begin(core.training, kwargs)
            try:
                return original(*args, **kwargs)
            finally:
                self._places, self._policy = None, {}

        handles = [module.register_forward_hook(partial(self._read, i)) for i, module in enumerate(self.modules)]
        core.forward = forward
        try:
            yield
        finally:
            core.forward = original
            for handle in handles:
                handle.remove()

    @property
    def projections(self) -> list[Projection]:
        """Of the micro-batch that is in the forward pass, after its backbone; empty where there is none."""
        where = self._in_prefix
        return [Projection(self._policy[i], self._reference[i].index_select(0, where)) for i in sorted(self._policy)]  # type: ignore[arg-type]

    def _begin(self, training: bool, kwargs: dict[str, Any]) -> None:
        """Find the prefix tokens of this micro-batch; the first time, run the prefix through the reference."""
        masks = getattr(kwargs.get("defended"), "masks", None)
        if not training or masks is None:
            return
        mask, ids, positions = masks[self.scope], kwargs["input_ids"], kwargs.get("position_ids")
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if positions is None else positions
        if self.prefix is None:
            every = torch.stack([one for tokens, one in masks.items() if tokens.scope == self.scope.scope]).any(0)
            self.prefix = _longest(every, ids, place)
            self._fill(self.prefix)
        inside = mask & (place < len(self.prefix))
        same = inside & (ids == self.prefix[place.clamp(max=len(self.prefix) - 1)])
        self._places = leading(same, positions).flatten().nonzero().squeeze(1)
        self._in_prefix = place.flatten()[self._places]

    @torch.no_grad()
    def _fill(self, prefix: Tensor) -> None:
        self._filling = True
        try:
            with self.layout.frozen(), reference_pass():
                self.layout.backbone(input_ids=prefix[None], use_cache=False)
        finally:
            self._filling = False

    def _read(self, index: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._filling:
            self._reference[index] = output.detach()[0]
        elif self._places is not None and not in_reference_pass():
            with unchanged_when_saved():  # a recomputation does not come here
                self._policy[index] = output.flatten(0, 1).index_select(0, self._places)


def _longest(mask: Tensor, ids: Tensor, place: Tensor) -> Tensor:
    """int64 [P]: token ids of the longest prefix. mask: bool [B, T], prefix tokens; place: where in its row each is."""
    end = int(torch.where(mask, place, -1).argmax())
    if not mask.flatten()[end]:
        raise UserError(
            "treft: no row begins with tokens of the chat template, so there is no prefix to hold; use rows of "
            "messages and a template that writes before the first text"
        )
    length = int(place.flatten()[end]) + 1
    return ids.flatten()[end + 1 - length : end + 1].clone()


def _projections(layer: nn.Module) -> list[nn.Module]:
    """A decoder layer's k_proj and v_proj, those of PEFT in place of what they wrap."""
    return [
        module
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in ("k_proj", "v_proj") and "base_layer" not in name
    ]
