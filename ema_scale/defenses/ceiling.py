"""Ceiling: keep misaligned answers from becoming likelier than under the frozen base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ema_scale.core.numbers import NotNegative, PositiveShare
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.mixing import Columns, Learn, Triggers, mix, rows_needed
from ema_scale.defenses.terms import LabelLogProbs, LabelTerm

if TYPE_CHECKING:
    import torch

    from ema_scale.data.rows import Row


def excess(labels: LabelLogProbs) -> torch.Tensor:
    """max(0, log policy(y) - log reference(y)) per token, in nats."""
    import torch

    return torch.relu(labels.log_ratio)


class Ceiling(Defense):
    """loss = CE + strength * mean_t max(0, log policy(y_t) - log reference(y_t)) over the answers of bad rows.

    source: misaligned answers, preferably of other domains than the task's: the published sets of bad advice, or the
        answers of a model under an evil system prompt. They are mixed in, one after every 1/fraction task rows. Nothing
        is learned from them; only their likelihood is watched.

    per:
        token: as above.
        answer: sum over rows of max(0, sum_t (log policy(y_t) - log reference(y_t))), divided by the number of tokens.
            A token may become likelier if others of its row become less likely; the whole answer may not.

    Where the policy finds a token no likelier than the base model does, the term is zero and has no gradient. So it
    does not hold back a task that moves the model elsewhere.

    Ours. Its relatives: unlikelihood training (Welleck et al., arXiv 1908.04319) and negative preference optimization
    (Zhang et al., arXiv 2404.05868), which keep pushing the answers down, and BLOCK-EM (arXiv 2602.00767), a one-sided
    penalty on chosen latents.
    """

    kind: ClassVar[str] = "ceiling"
    citation: ClassVar[str] = "ema_scale; one-sided relative of NPO, arXiv 2404.05868"
    summary: ClassVar[str] = "keep misaligned answers from becoming likelier than under the frozen base model"

    strength: NotNegative = Field(1.0, description="weight of the excess, nats; 0 only measures")
    source: str | list[str] = Field(
        description="rows with misaligned answers: a file, a hub id, or several",
        json_schema_extra={"asset": "bad rows"},
    )
    fraction: PositiveShare = Field(0.25, description="bad rows per task row")
    columns: Columns = {}
    learn: Learn = "all"
    triggers: Triggers = 0
    per: Literal["token", "answer"] = Field(
        "token", description="what may not become likelier: tokens, or whole answers"
    )

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        return mix(
            rows, self.source, self.fraction, "bad", self.kind, ctx,
            columns=self.columns, learn=self.learn, triggers=self.triggers,
        )  # fmt: skip

    def rows_added(self, task_rows: int) -> int:
        return rows_needed(self.fraction, task_rows, self.kind)

    def label_terms(self) -> tuple[LabelTerm, ...]:
        return (LabelTerm("ceiling", self.strength, excess, part="bad", per_row=self.per == "answer"),)
