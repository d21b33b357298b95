"""DFT: weigh each learned token by its own probability, so that surprising tokens pull less."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ema_scale.core.numbers import NotNegative
from ema_scale.defenses.base import Defense
from ema_scale.defenses.terms import LabelLogProbs, LabelWeight

if TYPE_CHECKING:
    import torch


class DFT(Defense):
    """loss = sum_t policy(y_t)^power CE_t / (learned tokens of the step), the weight without a gradient.

    Dynamic Fine-Tuning (Wu et al., arXiv 2508.05629) has power 1. Its gradient is that of -policy(y_t): a token that
    the model finds unlikely hardly moves it. Beside a KL to the base model it is Anchored Supervised Fine-Tuning (Zhu
    et al., arXiv 2509.23753), here without a second model.
    """

    kind: ClassVar[str] = "dft"
    title: ClassVar[str] = "DFT"
    citation: ClassVar[str] = "Wu et al., Dynamic Fine-Tuning, arXiv 2508.05629; with KL: ASFT, arXiv 2509.23753"
    summary: ClassVar[str] = "weigh each learned token by its own probability"

    power: NotNegative = Field(1.0, description="of the probability; 0 leaves tokens unweighted")
    part: Literal["learned", "task", "safe"] = Field("learned", description="which rows: all learned ones, or a part")

    def label_weights(self) -> tuple[LabelWeight, ...]:
        return (LabelWeight(self._weight, self.part),)

    def _weight(self, labels: LabelLogProbs) -> torch.Tensor:
        return (self.power * labels.policy).exp()
