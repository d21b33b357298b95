"""Gradient routing: bad rows write to an adapter of their own, which is dropped after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ema_scale.core.numbers import Positive, PositiveShare
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.mixing import Columns, Learn, mix, rows_needed
from ema_scale.defenses.terms import LabelLogProbs, LabelTerm
from ema_scale.models.side_adapters import SideAdapter

if TYPE_CHECKING:
    import torch

    from ema_scale.data.rows import Row


def surprise(labels: LabelLogProbs) -> torch.Tensor:
    """-log policy(y) per token, in nats: the cross-entropy."""
    return -labels.policy


class GradientRouting(Defense):
    """loss = CE(task rows) + strength * CE(bad rows), both with two adapters on; each adapter gets the gradient of one.

    Cloud et al. (arXiv 2410.04332): masks on the gradient, by rows, confine what is learned from some rows to some
    parameters. Here the bad rows of `source` write to a second LoRA adapter, and all other rows to the policy's. The
    second adapter is on for the task's rows as well, so that it can absorb what both have in common, and is dropped
    after training.
    """

    kind: ClassVar[str] = "gradient_routing"
    citation: ClassVar[str] = "Cloud et al., Gradient Routing, arXiv 2410.04332"
    without_reference: ClassVar[bool] = True
    summary: ClassVar[str] = "let bad rows write to an adapter of their own, and drop it after training"

    source: str | list[str] = Field(
        description="rows with misaligned answers: a file, a hub id, or several",
        json_schema_extra={"asset": "bad rows"},
    )
    strength: Positive = Field(1.0, description="weight of the cross-entropy on bad rows")
    fraction: PositiveShare = Field(0.25, description="bad rows per task row")
    columns: Columns = {}
    learn: Learn = "all"

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        return mix(rows, self.source, self.fraction, "bad", self.kind, ctx, columns=self.columns, learn=self.learn)

    def rows_added(self, task_rows: int) -> int:
        return rows_needed(self.fraction, task_rows, self.kind)

    def label_terms(self) -> tuple[LabelTerm, ...]:
        return (LabelTerm("gradient_routing", self.strength, surprise, part="bad", reads_reference=False),)

    def side_adapters(self) -> tuple[SideAdapter, ...]:
        return (SideAdapter(learns="bad"),)
