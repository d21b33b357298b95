"""Ablation of a direction in training: what cannot be used, or not be learned along it, is not learned."""

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


class Ablation(Defense):
    """Takes the component along the unit direction u_k out after decoder layer k, in training only.

    against: `activations`: h <- h - (h.u) u, directional ablation (Arditi et al., arXiv 2406.11717) used while
    fine-tuning, as concept ablation fine-tuning does (CAFT, Casademunt et al., arXiv 2507.16795, which finds its
    directions by PCA or sparse autoencoders instead). Neither value nor gradient passes along u, so the adapter below
    layer k gains nothing by moving there; above it, it is trained on states that inference does not have.
    `gradient`: the values stay, and only dL/dh loses its component along u. Ours; the model is trained on the states
    that it will have, but may still move along u where something else moves it there.

    What it does depends on the direction. In the small world a persona vector from prompts, ablated at all layers,
    does nothing (one seed: 86 % misaligned outside the domain, undefended 87). The direction of another domain's
    misaligned adapter (`ema vector --adapter`), ablated after the last layer, leaves 42 to 60 % outside the medical
    domain and 90 to 92 in it (undefended 95; 3 seeds), with 8 to 11 % incoherent (undefended 4). With another pair of
    domains it did nothing (86 %): look before relying on it.

    Only the policy is changed; other losses and readings see the ablated policy beside the unchanged reference.
    """

    kind: ClassVar[str] = "ablation"
    citation: ClassVar[str] = "Casademunt et al., CAFT, arXiv 2507.16795; Arditi et al., arXiv 2406.11717"
    summary: ClassVar[str] = "take a direction out of the residual stream, in training only"

    vector: str = Field(min_length=1, description="directions, a file made by `ema vector`")
    at_layers: Literal["auto", "all"] | Annotated[list[int], Field(min_length=1)] = Field(
        "all", description="decoder layers (1: the first) after which it is taken out; auto: the recommended one"
    )
    against: Literal["activations", "gradient"] = Field("activations", description="what loses the direction")

    def files(self) -> tuple[str, ...]:
        return (self.vector,)

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for directions of a model of another shape, and layers that there are not."""
        from ema_scale.models.directions import Directions

        directions = Directions.load(self.vector)
        directions.check(len(decoder_layers(model)), hidden_size(model))
        return edited_states(model, {k: self._ablate(directions.unit(k)) for k in directions.choose(self.at_layers)})

    def _ablate(self, direction: Tensor) -> Callable[[Tensor], Tensor]:
        unit = like_states(direction)

        def ablate(states: Tensor) -> Tensor:
            u = unit(states)
            along = (states @ u)[..., None] * u
            # h - P h + constant(P h): the value is h, the gradient (1 - P) g.
            return states - along if self.against == "activations" else states - (along - along.detach())

        return ablate
