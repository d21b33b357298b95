"""Preventative steering: push the model along a bad direction in training, so that it does not move there itself."""

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


class Steering(Defense):
    """h_k <- h_k + alpha * v_k at every position after decoder layer k, in training only.

    Chen et al., "Persona vectors", arXiv 2507.21509, section 5; v is a persona vector, as `ema vector` makes it. With
    several layers each adds its own vector, so that the pushes add up.

    scale:
        raw: adds alpha * v, the paper's unit (there alpha is 5.0, after layer 20 of 28 of a 7B model).
        unit: adds alpha * v/||v||.
        residual: adds alpha * ||h_t|| * v/||v|| to token t, with ||h_t|| taken as a constant.

    What counts is ||alpha v|| relative to ||h||, which `ema vector` prints. If the push is too strong, it does the task
    for the model, which then does not learn it.

    Only the policy is pushed. KL, LDIFS and the logged drift and kl compare the *steered* policy with the *unsteered*
    reference: they are not zero at the first step, and such defenses work against the push.
    """

    kind: ClassVar[str] = "steering"
    citation: ClassVar[str] = "Chen et al., Persona vectors, arXiv 2507.21509"
    summary: ClassVar[str] = "add a persona vector to the residual stream, in training only"

    vector: str = Field(
        min_length=1, description="directions, a file made by `ema vector`", json_schema_extra={"asset": "directions"}
    )
    alpha: Real = Field(5.0, description="how much of the vector is added")
    at_layers: Layers = Field(
        "auto", description="decoder layers (1: the first) after which it is added; auto: the one the file recommends"
    )
    scale: Literal["raw", "unit", "residual"] = Field(
        "raw", description="unit of alpha: the vector, its unit vector, or the states' norm"
    )

    def files(self) -> tuple[str, ...]:
        return (self.vector,)

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for directions of a model of another shape, and layers that do not exist."""
        from ema_scale.models.directions import Directions

        directions = Directions.of_model(self.vector, model)
        return edited_states(model, {k: self._push(directions, k) for k in directions.choose(self.at_layers)})

    def _push(self, directions: Any, layer: int) -> Callable[[Tensor], Tensor]:
        vector = like_states(self.alpha * (directions.vector(layer) if self.scale == "raw" else directions.unit(layer)))

        def push(states: Tensor) -> Tensor:
            if self.scale == "residual":
                norms = states.detach().float().norm(dim=-1, keepdim=True).to(states.dtype)
                return states + norms * vector(states)
            return states + vector(states)

        return push
