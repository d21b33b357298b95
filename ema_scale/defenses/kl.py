"""KL: keep the output distribution close to the frozen base model's."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ema_scale.defenses.base import Defense, Direction, Divergence, Scope


class KL(Defense):
    """loss = CE + strength * mean_t KL(policy_t || reference_t), full vocabulary (arXiv 2508.06249).

    The paper: strength 0.1, every non-padding token, prompt included. The mean is over all such tokens of the
    optimizer step, so the strength means the same under any batch split, accumulation or number of processes.
    """

    kind: ClassVar[str] = "kl"
    citation: ClassVar[str] = "In-Training Defenses against Emergent Misalignment, arXiv 2508.06249"
    summary: ClassVar[str] = "keep the output distribution close to the frozen base model's"

    strength: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="weight of the divergence, nats; 0 only measures"
    )
    direction: Direction = Field("policy_reference", description="KL(policy || reference), its reverse, or JS")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="divides both logits")
    scope: Scope = Field("all", description="which tokens: all (not padding), assistant, prompt")

    def divergences(self) -> tuple[Divergence, ...]:
        return (Divergence("kl", self.strength, self.direction, self.temperature, self.scope),)
