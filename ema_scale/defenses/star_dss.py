"""STAR-DSS: learn the tokens that a guard finds safe, and stay with the base model on the others."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ema_scale.core.numbers import Cosine, CountOrZero, NotNegative, Positive
from ema_scale.defenses.base import Defense, PenaltyInputs
from ema_scale.defenses.terms import Divergence
from ema_scale.models.layout import decoder_layers, hidden_size

if TYPE_CHECKING:
    import torch

    from ema_scale.models.directions import Directions


class StarDSS(Defense):
    """loss = sum_t [s_t CE_t + (1 - s_t) strength KL(policy_t || reference_t)] / (learned tokens of the step).

    Peng et al. (arXiv 2505.17196, eq. 3), with s_t the safety of the answer so far. They ask a guard model after every
    few tokens. The guard here is the frozen base model itself: with h_t its hidden state after a layer and u a trait
    direction such as `ema vector` makes, s_t = sigmoid((limit - m_t) / width), where m_t is the mean over the answer's
    tokens so far of cos(h_t, u). It costs no pass beyond the reference's own.

    For a guard of your own, write a defense with `token_weights`.
    """

    kind: ClassVar[str] = "star_dss"
    title: ClassVar[str] = "STAR-DSS"
    citation: ClassVar[str] = "Peng et al., Shape it Up, arXiv 2505.17196"
    summary: ClassVar[str] = "learn tokens that a guard finds safe; stay with the base model on the others"

    vector: str = Field(
        min_length=1, description="directions, a file made by `ema vector`", json_schema_extra={"asset": "directions"}
    )
    limit: Cosine = Field(description="cosine with the direction at which a token counts half")
    strength: NotNegative = Field(1.0, description="weight of the KL on unsafe tokens, nats")
    width: Positive = Field(0.02, description="cosine over which the weight falls")
    at_layer: CountOrZero | None = Field(
        None, description="decoder layer (1: the first) of the states; null: the middle one"
    )

    def files(self) -> tuple[str, ...]:
        return (self.vector,)

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for directions of a model of another shape, and layers that do not exist."""
        count = len(decoder_layers(model))
        self._directions.check(count, hidden_size(model))
        self._directions.unit(*self.penalty_layers(count))
        return contextlib.nullcontext()

    @cached_property
    def _directions(self) -> Directions:
        from ema_scale.models.directions import Directions

        return Directions.load(self.vector)

    def divergences(self) -> tuple[Divergence, ...]:
        return (Divergence("star_dss", self.strength, scope="assistant"),)

    def penalty_layers(self, num_layers: int) -> tuple[int, ...]:
        return ((num_layers + 1) // 2 if self.at_layer is None else self.at_layer,)

    def token_weights(self, inputs: PenaltyInputs) -> Mapping[str, torch.Tensor]:
        from torch.nn.functional import cosine_similarity

        (layer,) = inputs.reference
        _, reference = inputs.states(layer, "assistant")
        direction = self._directions.unit(layer).to(reference)
        so_far = inputs.means_so_far(cosine_similarity(reference, direction, dim=-1), "assistant")
        safety = ((self.limit - so_far) / self.width).sigmoid()
        return {"ce": safety, "star_dss": 1 - safety}
