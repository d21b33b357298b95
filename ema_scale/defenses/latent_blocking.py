"""Latent blocking: chosen directions of the hidden states may not grow above the frozen base model's."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ema_scale.core.numbers import NotNegative
from ema_scale.defenses.base import Defense, PenaltyInputs
from ema_scale.defenses.direction_files import Files, Layers, check_files, layers_of, listed
from ema_scale.defenses.terms import Scope

if TYPE_CHECKING:
    import torch

    from ema_scale.models.directions import Directions


class LatentBlocking(Defense):
    """loss = CE + strength * sum_l mean_t [sum_k max(0, d_lt.u_lk)^2 + sum_j max(0, -d_lt.w_lj)^2].

    d = policy - reference, hidden states after layer l; u: unit directions of `vector`, along which states may not grow
    above the reference's; w: those of `floor`, along which they may not fall below them. A state that moves the other
    way, or stays, costs nothing and has no gradient.

    BLOCK-EM (arXiv 2602.00767) blocks chosen latents of a sparse autoencoder, z = encoder(h), at one layer and on the
    tokens of the answers. The encoder's row of a latent is such a direction; its bias cancels in the difference. Where
    a latent is off under both models theirs is 0 and ours is not.

    normalise:
        relative: d is divided by the reference's length, so that a strength carries over to models of another width.
        none: the states' own unit, as theirs.
    """

    kind: ClassVar[str] = "latent_blocking"
    citation: ClassVar[str] = "Ustaomeroglu and Qu, BLOCK-EM, arXiv 2602.00767"
    summary: ClassVar[str] = "keep chosen directions of the hidden states from growing above the frozen base model's"
    layer_by_layer: ClassVar[bool] = True

    strength: NotNegative = Field(10.0, description="weight of the squared excess")
    vector: Files = Field(
        min_length=1,
        description="directions that may not grow: files made by `ema vector`",
        json_schema_extra={"asset": "directions"},
    )
    floor: Files = Field([], description="directions that may not shrink: such files")
    at_layers: Layers = Field(
        "auto", description="after which decoder layers (1: the first); auto: the one that each file recommends"
    )
    scope: Scope = Field("assistant", description="which tokens: all, assistant, prompt, template, prefix")
    normalise: Literal["relative", "none"] = Field(
        "relative", description="unit of the excess: the reference's length, or the states' own"
    )

    def files(self) -> tuple[str, ...]:
        return (*listed(self.vector), *listed(self.floor))

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for directions of a model of another shape, and layers that do not exist."""
        check_files(self.files(), self.at_layers, model)
        return contextlib.nullcontext()

    def penalty_layers(self, num_layers: int) -> tuple[int, ...]:
        return layers_of(self.files(), self.at_layers, num_layers)

    @property
    def needs_reference(self) -> bool:
        return True

    def penalty(self, inputs: PenaltyInputs) -> torch.Tensor | None:
        import torch

        return self.strength * torch.stack([self._layer(inputs, layer) for layer in sorted(inputs.policy)]).sum()

    @cached_property
    def _directions(self) -> list[tuple[Directions, float]]:
        """Each file's directions, and the sign of the way that is blocked."""
        from ema_scale.models.directions import Directions

        signs = [(file, 1.0) for file in listed(self.vector)] + [(file, -1.0) for file in listed(self.floor)]
        return [(Directions.load(file), sign) for file, sign in signs]

    def _layer(self, inputs: PenaltyInputs, layer: int) -> torch.Tensor:
        import torch

        policy, reference = inputs.states(layer, self.scope)
        moved = policy - reference
        if self.normalise == "relative":
            moved = moved / reference.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        blocked = [sign * d.unit(layer) for d, sign in self._directions if layer in d.choose(self.at_layers)]
        excess = torch.relu(moved @ torch.stack(blocked, dim=1).to(moved))
        return inputs.mean(excess.square().sum(-1), self.scope)
