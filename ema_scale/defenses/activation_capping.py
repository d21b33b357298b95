"""Activation capping: hold hidden states below a cap along a direction, while training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ema_scale.core.numbers import Real
from ema_scale.defenses.base import Defense
from ema_scale.defenses.direction_files import Layers
from ema_scale.models.hooks import edited_states, like_states

if TYPE_CHECKING:
    from torch import Tensor


class ActivationCapping(Defense):
    """h_k <- h_k - max(0, h_k.u_k - c) u_k after decoder layer k, in training only; u is a unit direction.

    Lu et al., "The Assistant Axis", arXiv 2601.10387, who cap at inference; their released code has this formula. Where
    a state is below the cap it is left alone, unlike under ablation; where it is above, neither value nor gradient
    passes along u. As under ablation, layers above are trained on states that inference does not have.

    scale:
        raw: c = cap, in the unit of the states.
        residual: c = cap * ||h_t||, with ||h_t|| taken as a constant; cap is then a cosine.

    side:
        above: states may not rise above the cap (u points to the bad side, as a persona vector's).
        below: states may not fall below it, h + max(0, c - h.u) u (u points to the good side, as the assistant axis).
    """

    kind: ClassVar[str] = "activation_capping"
    citation: ClassVar[str] = "Lu et al., The Assistant Axis, arXiv 2601.10387"
    summary: ClassVar[str] = "hold hidden states below a cap along a direction, in training only"

    vector: str = Field(
        min_length=1,
        description="directions, a file made by `ema vector`",
        json_schema_extra={"asset": "directions"},
    )
    cap: Real = Field(0.0, description="the largest projection that is left alone")
    at_layers: Layers = Field(
        "auto", description="decoder layers (1: the first) after which it acts; auto: the one the file recommends"
    )
    scale: Literal["raw", "residual"] = Field("residual", description="unit of the cap: the states', or their norm")
    side: Literal["above", "below"] = Field(
        "above", description="what is cut off: what lies above the cap, or below it"
    )

    def files(self) -> tuple[str, ...]:
        return (self.vector,)

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for directions of a model of another shape, and layers that do not exist."""
        from ema_scale.models.directions import Directions

        directions = Directions.of_model(self.vector, model)
        return edited_states(model, {k: self._capped(directions.unit(k)) for k in directions.choose(self.at_layers)})

    def _capped(self, direction: Tensor) -> Callable[[Tensor], Tensor]:
        unit = like_states(direction)
        sign = 1.0 if self.side == "above" else -1.0

        def capped(states: Tensor) -> Tensor:
            u = unit(states)
            limit = self.cap * states.detach().norm(dim=-1) if self.scale == "residual" else self.cap
            excess = sign * (states @ u - limit)
            return states - sign * excess.clamp_min(0)[..., None] * u

        return capped
