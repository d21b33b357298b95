"""Ablation: take a direction out of the hidden states, or out of their gradient, while training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ema_scale.defenses.base import Defense
from ema_scale.defenses.direction_files import Layers
from ema_scale.models.hooks import edited_states, like_states

if TYPE_CHECKING:
    from torch import Tensor


class Ablation(Defense):
    """Takes the component along the unit direction u_k out after decoder layer k, in training only.

    against:
        activations: h <- h - (h.u) u, directional ablation (Arditi et al., arXiv 2406.11717), applied while fine-tuning
            as in CAFT (Casademunt et al., arXiv 2507.16795, which finds its directions by PCA or sparse autoencoders).
            Neither value nor gradient passes along u. The adapter below layer k gains nothing by moving there; above
            it, the adapter is trained on states that inference does not have.
        gradient: only dL/dh loses its component along u. Ours. The model is trained on the states that it will have,
            but may still move along u for another reason.

    The effect depends on the direction: check it on your task. Only the policy is changed. Other loss terms and metrics
    compare the ablated policy with the unchanged reference.
    """

    kind: ClassVar[str] = "ablation"
    citation: ClassVar[str] = "Casademunt et al., CAFT, arXiv 2507.16795; Arditi et al., arXiv 2406.11717"
    summary: ClassVar[str] = "take a direction out of the residual stream, in training only"

    vector: str = Field(
        min_length=1, description="directions, a file made by `ema vector`", json_schema_extra={"asset": "directions"}
    )
    at_layers: Layers = Field(
        "all", description="decoder layers (1: the first) after which it is taken out; auto: the recommended one"
    )
    against: Literal["activations", "gradient"] = Field("activations", description="what loses the direction")

    def files(self) -> tuple[str, ...]:
        return (self.vector,)

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for directions of a model of another shape, and layers that do not exist."""
        from ema_scale.models.directions import Directions

        directions = Directions.of_model(self.vector, model)
        return edited_states(model, {k: self._ablate(directions.unit(k)) for k in directions.choose(self.at_layers)})

    def _ablate(self, direction: Tensor) -> Callable[[Tensor], Tensor]:
        unit = like_states(direction)

        def ablate(states: Tensor) -> Tensor:
            u = unit(states)
            projection = (states @ u)[..., None] * u
            # h - P h + constant(P h): the value is h, the gradient (1 - P) g.
            removed = projection if self.against == "activations" else projection - projection.detach()
            return states - removed

        return ablate
