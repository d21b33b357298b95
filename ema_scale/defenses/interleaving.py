"""Interleaving: mix safe chat rows into the training rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.errors import UserError

if TYPE_CHECKING:
    from ema_scale.chat.rows import Row


class Interleaving(Defense):
    """One safe row after every 1/fraction task rows (arXiv 2508.06249: 5 %, one after every 20).

    Exactly floor(fraction * task rows) safe rows, evenly spread, drawn without replacement in an order that
    depends on the seed alone; if the source has fewer, it is drawn through again in a new order, and that is
    reported. The trainer's seeded sampler shuffles afterwards, so the fraction holds over an epoch, not in
    every batch.
    """

    kind: ClassVar[str] = "interleaving"
    citation: ClassVar[str] = "In-Training Defenses against Emergent Misalignment, arXiv 2508.06249"
    summary: ClassVar[str] = "mix safe chat rows into the training rows"

    source: str = Field(description="safe rows: a file, a hub id, or smallworld:safe")
    fraction: float = Field(0.05, gt=0, le=1, description="safe rows per task row")

    def rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        safe = [replace(row, tag="safe") for row in ctx.load(self.source)]
        if not safe:
            raise UserError(f"{self.source}: found no safe rows, expected at least one")
        ratio = Fraction(str(self.fraction))
        needed = int(len(rows) * ratio)
        if needed == 0:
            raise UserError(
                f"interleaving fraction {self.fraction:g} of {len(rows)} task rows is less than one row; "
                f"expected at least {1 / max(len(rows), 1):.2g}"
            )
        drawn = _draw(safe, needed, ctx.seed)
        mixed: list[Row] = []
        used = 0
        for count, row in enumerate(rows, start=1):
            mixed.append(row)
            while used < int(count * ratio):
                mixed.append(drawn[used])
                used += 1
        ctx.notes.append(f"interleaving: {used} safe rows among {len(rows)} task rows, from {self.source}")
        if needed > len(safe):
            ctx.notes.append(f"interleaving: {self.source} has only {len(safe)} rows; some repeat")
        return mixed


def _draw(safe: Sequence[Row], needed: int, seed: int) -> list[Row]:
    # Its own generator: the draw must not depend on what else consumed random numbers before.
    generator = random.Random(f"interleaving-{seed}")
    drawn: list[Row] = []
    while len(drawn) < needed:
        drawn += generator.sample(list(safe), min(len(safe), needed - len(drawn)))
    return drawn
