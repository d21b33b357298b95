"""Held-out rows in the report: whether the task that the rows teach was learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ema_scale.evaluation.record_types import Mean
from ema_scale.evaluation.seen import loss_among
from ema_scale.report.aggregate import RunGroup, base_of, undefended_of
from ema_scale.report.paired import HELD_OUT, Measure, corrected, mean_against, measures, nats_cell
from ema_scale.report.scores import mean_cell
from ema_scale.report.table import Cell, Table, TableRow, kind

NOTE = (
    "The loss of each row’s last answer behind all that stands in front of it: the mean over rows, in nats per token, "
    "with 95 % intervals clustered by question. A loss below the base model’s means that the task was learned. “To the "
    "base”: the mean difference, row by row, with its 95 % interval; p values are corrected for the number of lines "
    "(Holm). Rows whose question a training row asks are left out if there are others."
)


def held_out_table(groups: Sequence[RunGroup]) -> Table | None:
    """The table for the groups of one model, a column per suite; None without held-out rows."""
    losses = _losses(groups)
    if not losses:
        return None
    base = base_of(groups)
    others = [g for g in groups if not g.base]
    columns = []
    for loss in losses:
        apart = corrected([None if base is None else mean_against(g, base, loss) for g in others])
        to_base = dict(zip((id(g) for g in others), apart, strict=True))
        columns.append([_cell(_means(g, loss), nats_cell(to_base.get(id(g)))) for g in groups])
    lines = [TableRow(g.label, kind(g), cells) for g, cells in zip(groups, zip(*columns, strict=True), strict=True)]
    return Table("Held-out rows", NOTE, [loss.name for loss in losses], lines)


def held_out_sentences(groups: Sequence[RunGroup]) -> list[str]:
    """Whether the task was learned, and how one sees it; [] without the losses of the base and of no defense."""
    base, none = base_of(groups), undefended_of(groups)
    cells = [
        (loss.title, start, end)
        for loss in _losses(groups)
        if base is not None and none is not None
        if (start := _cell(_means(base, loss), None)) and (end := _cell(_means(none, loss), None))
    ]
    told = [f"from {start.value} to {end.value} on {suite}" for suite, start, end in cells]
    if not told:
        return []
    return [
        f"Training without a defense takes the held-out loss {', '.join(told)} (nats per token). "
        "A loss below the base’s means that the task was learned."
    ]


def _losses(groups: Sequence[RunGroup]) -> list[Measure]:
    return [measure for measure in measures(groups) if measure.role == HELD_OUT]


def _means(group: RunGroup, loss: Measure) -> list[Mean]:
    """The loss of each run on the suite's rows, those that no run was trained on if there are any."""
    found = [loss_among([q for q in run.questions if loss.value(q) is not None]) for run in group.runs]
    return [mean for mean in found if mean is not None]


def _cell(losses: Sequence[Mean], apart: Cell | None) -> Cell | None:
    cell = mean_cell(losses, ".3f")
    return replace(cell, below=f"to the base {apart.value} {apart.limits}, {apart.below}") if cell and apart else cell
