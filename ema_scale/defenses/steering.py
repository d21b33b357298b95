"""Preventative steering: push the model along a bad direction while it trains, so that it need not move there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ema_scale.defenses.base import Defense
from ema_scale.models.hooks import edited_states, like_states
from ema_scale.models.layout import decoder_layers, hidden_size

if TYPE_CHECKING:
    from torch import Tensor


class Steering(Defense):
    """h_k <- h_k + alpha * v_k at every position after decoder layer k, in training only.

    Chen et al., "Persona vectors", arXiv 2507.21509, section 5 (preventative steering); v is a persona vector, as
    `ema vector` makes it. With several layers each adds its own vector, so that the push adds up.

    scale: `raw` adds alpha * v, the paper's unit (there alpha 5.0 after layer 20 of 28 of a 7B model); `unit` adds
    alpha * v/||v||; `residual` adds alpha * ||h_t|| * v/||v|| to token t, its norm taken as a constant.

    Strength: what counts is ||alpha v|| beside ||h||, which `ema vector` prints. In the small world (||v|| half of
    ||h||, layer 3 of 4, bad medical rows, 3 seeds) alpha 1 leaves 50 to 64 % misaligned outside the domain and 82 to
    84 % in it, 1.5 leaves 26 to 44 and 45 to 57; 2 (one seed) 13 and 19, undefended 87 and 95. Past 1 the push does
    the task for the model, which then no longer learns it. Coherence, and a benign task (one seed), are not harmed.

    Only the policy is pushed: with KL or LDIFS beside it, those compare the *steered* policy with the *unsteered*
    reference, so that they are not zero at the first step and work against the push. The same holds for the logged
    drift and kl of a steered run.
    """

    kind: ClassVar[str] = "steering"
    citation: ClassVar[str] = "Chen et al., Persona vectors, arXiv 2507.21509"
    summary: ClassVar[str] = "add a persona vector to the residual stream, in training only"

    vector: str = Field(min_length=1, description="directions, a file made by `ema vector`")
    alpha: float = Field(5.0, allow_inf_nan=False, description="how much of the vector is added")
    at_layers: Literal["auto", "all"] | Annotated[list[int], Field(min_length=1)] = Field(
        "auto", description="decoder layers (1: the first) after which it is added; auto: the one the file recommends"
    )
    scale: Literal["raw", "unit", "residual"] = Field("raw", description="the unit of alpha, see above")

    def files(self) -> tuple[str, ...]:
        return (self.vector,)

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for directions of a model of another shape, and layers that there are not."""
        from ema_scale.models.directions import Directions

        directions = Directions.load(self.vector)
        directions.check(len(decoder_layers(model)), hidden_size(model))
        return edited_states(model, {k: self._push(directions, k) for k in directions.choose(self.at_layers)})

    def _push(self, directions: Any, layer: int) -> Callable[[Tensor], Tensor]:
        vector = like_states(self.alpha * (directions.vector(layer) if self.scale == "raw" else directions.unit(layer)))

        def push(states: Tensor) -> Tensor:
            if self.scale == "residual":
                norms = states.detach().float().norm(dim=-1, keepdim=True).to(states.dtype)
                return states + norms * vector(states)
            return states + vector(states)

        return push
