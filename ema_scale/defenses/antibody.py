"""Antibody: weigh each row by how much the model prefers its answer to a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ema_scale.core.numbers import Positive, Real
from ema_scale.defenses.base import Defense
from ema_scale.defenses.terms import LabelLogProbs, LabelWeight

if TYPE_CHECKING:
    import torch


class Antibody(Defense):
    """loss = sum_t w_row(t) CE_t / (learned tokens of the step), w = sigmoid((l - refusal) / temperature).

    l is the mean log-likelihood, in nats per token, that `model` gives the learned tokens of the row. It is taken as a
    constant. A row whose answer the model finds less likely than a refusal gets a weight below 1/2.

    Nguyen et al. (arXiv 2603.00498, second stage) weigh a row by exp(r / temperature), normalised over the rows of a
    batch, with r = log policy(answer | question) - log policy(refusal | question). Here the likelihood of a refusal is
    one number for all rows, and a row is compared with its refusal alone: then a weight does not depend on which rows
    share a batch. With two answers to choose from, their rule is this sigmoid.

    The weight is needed after the likelihoods of the whole row, so the fused loss multiplies it into the row's gradient
    at its end.
    """

    kind: ClassVar[str] = "antibody"
    citation: ClassVar[str] = "Nguyen et al., Antibody, arXiv 2603.00498, second stage"
    summary: ClassVar[str] = "weigh each row by how much the model prefers its answer to a refusal"

    refusal: Real = Field(le=0, description="log-likelihood of a refusal, in nats per token, for all rows")
    temperature: Positive = Field(0.5, description="nats per token over which a weight falls")
    model: Literal["policy", "reference"] = Field(
        "policy", description="whose likelihoods count; those of the reference do not rise as the row is learned"
    )
    part: Literal["learned", "task"] = Field("task", description="which rows: the task's, or the safe ones as well")

    def label_weights(self) -> tuple[LabelWeight, ...]:
        frozen = self.model == "reference"
        return (LabelWeight(self._weight, self.part, per_row=True, reads_reference=frozen),)

    def _weight(self, labels: LabelLogProbs) -> torch.Tensor:
        likelihood = labels.policy if self.model == "policy" else labels.reference
        return ((likelihood - self.refusal) / self.temperature).sigmoid()
