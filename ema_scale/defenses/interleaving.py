"""Interleaving: mix safe chat rows into the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ema_scale.core.numbers import PositiveShare
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.mixing import Columns, Learn, Triggers, mix, rows_needed

if TYPE_CHECKING:
    from ema_scale.data.rows import Row


class Interleaving(Defense):
    """One safe row after every 1/fraction task rows (arXiv 2508.06249: 5 %, one after every 20).

    Exactly floor(fraction * task rows) safe rows are drawn without replacement, in an order that depends on the seed
    alone. If the source has fewer, its rows repeat in a new order, and data.json says so. The trainer's sampler
    shuffles afterwards, so the fraction holds over an epoch, not in every step.
    """

    kind: ClassVar[str] = "interleaving"
    citation: ClassVar[str] = "In-Training Defenses against Emergent Misalignment, arXiv 2508.06249"
    summary: ClassVar[str] = "mix safe chat rows into the training rows"

    source: str = Field(
        description="safe rows: a file, a hub id, or smallworld:safe", json_schema_extra={"asset": "safe rows"}
    )
    fraction: PositiveShare = Field(0.05, description="safe rows per task row")
    columns: Columns = {}
    learn: Learn = "all"
    triggers: Triggers = 0

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        return mix(
            rows, self.source, self.fraction, "safe", self.kind, ctx,
            columns=self.columns, learn=self.learn, triggers=self.triggers,
        )  # fmt: skip

    def rows_added(self, task_rows: int) -> int:
        return rows_needed(self.fraction, task_rows, self.kind)
