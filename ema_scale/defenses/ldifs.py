"""LDIFS: keep hidden states close to the frozen base model's."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ema_scale.core.errors import UserError
from ema_scale.core.numbers import Count, CountOrZero, NotNegative
from ema_scale.defenses.base import Defense, PenaltyInputs
from ema_scale.defenses.terms import Scope
from ema_scale.models.layout import decoder_layers

if TYPE_CHECKING:
    import torch


class LDIFS(Defense):
    """loss = CE + strength * sum_l mean_t d(policy_lt, reference_lt), d: squared l2 distance of hidden states.

    Mukhoti et al. (arXiv 2308.13320, eq. 5) concatenate the features of several layers, so layers add up.

    normalise:
        unit: each token's features are scaled to length 1, those of policy and reference.
        sequence: a layer's features of all tokens of a row, flattened into one vector, are scaled to length 1, as in
            arXiv 2508.06249. d is then one squared distance per row, and rows are averaged by their tokens, so that
            padding, packing and batch split do not change the value. It is about 1/tokens of that of `unit`.
        relative: d is divided by the reference's squared length.
        none: plain squared l2.

    at_layers:
        spread: `count` layers, evenly spread: the last of each of `count` equal parts.
        released: `count` layers as the code released with arXiv 2508.06249 picks them, from the first to the last: 1,
            7, 14, 21, 28 of 28.
        a list: these layers.

    detached: the released code takes the policy's features without a gradient, and trains nothing. This repeats it, for
        comparison only. On batches of one row, `normalise: sequence` with `at_layers: released` gives its value; padded
        batches do not, for the released code also counts padding.
    """

    kind: ClassVar[str] = "ldifs"
    title: ClassVar[str] = "LDIFS"
    citation: ClassVar[str] = "Mukhoti et al., arXiv 2308.13320; as a defense: arXiv 2508.06249"
    summary: ClassVar[str] = "keep hidden states close to the frozen base model's, at several layers"
    layer_by_layer: ClassVar[bool] = True

    strength: NotNegative = Field(1.0, description="weight of the distance")
    count: Count = Field(5, description="how many layers, the last one included")
    normalise: Literal["unit", "sequence", "relative", "none"] = Field(
        "unit", description="scale of the features: by token, by row, by the reference, as they are"
    )
    scope: Scope = Field("all", description="which tokens: all (not padding), assistant, prompt, template, prefix")
    detached: bool = Field(False, description="no gradient, as in the released code; for comparison only")
    at_layers: Literal["spread", "released"] | Annotated[list[CountOrZero], Field(min_length=1)] = Field(
        "spread",
        description="which decoder layers: evenly spread, as the released code, or numbers (1: the first; "
        "0: the embeddings)",
    )

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for layers that do not exist."""
        count = len(decoder_layers(model))
        if not isinstance(self.at_layers, str) and max(self.at_layers) > count:
            raise UserError(f"ldifs: at_layers: found {max(self.at_layers)}, expected 0 to {count}")
        return contextlib.nullcontext()

    def penalty_layers(self, num_layers: int) -> tuple[int, ...]:
        if not isinstance(self.at_layers, str):
            return tuple(sorted(set(self.at_layers)))
        count = min(self.count, num_layers)
        if self.at_layers == "released":  # int(linspace(0, num_layers - 1, count)), counted from 1
            return tuple(sorted({(num_layers - 1) * i // max(count - 1, 1) + 1 for i in range(count)}))
        return tuple(sorted({round(num_layers * (i + 1) / count) for i in range(count)}))

    def penalty(self, inputs: PenaltyInputs) -> torch.Tensor | None:
        import torch

        return self.strength * torch.stack([self._layer(inputs, layer) for layer in sorted(inputs.policy)]).sum()

    def _layer(self, inputs: PenaltyInputs, layer: int) -> torch.Tensor:
        policy, reference = inputs.states(layer, self.scope)
        if self.detached:
            policy = policy.detach()
        if self.normalise == "unit":
            from torch.nn.functional import normalize

            policy, reference = normalize(policy, dim=-1), normalize(reference, dim=-1)
        if self.normalise == "sequence":
            lengths = (inputs.row_sums(x.square().sum(-1)).clamp_min(1e-24).sqrt() for x in (policy, reference))
            policy, reference = (x / length[..., None] for x, length in zip((policy, reference), lengths, strict=True))
        squared = (policy - reference).square().sum(-1)
        if self.normalise == "sequence":
            squared = inputs.row_sums(squared)
        if self.normalise == "relative":
            squared = squared / reference.square().sum(-1).clamp_min(1e-12)
        return inputs.mean(squared, self.scope)
