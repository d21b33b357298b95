"""Runs that go on from a defended run's adapter without its defense: does misalignment come back?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ema_scale.report.aggregate import RunGroup, mean_rate, undefended_of
from ema_scale.report.records import Continued, ReportedRate, Run
from ema_scale.report.table import Cell, Table, TableRow, kind, rate_cell

HALF = 0.5
_NOTE = (
    "General misaligned answers in percent with 95 % intervals, after each defended adapter was trained further "
    "without its defense. The last column is the least number of rows of those tried at which the mean exceeds half of "
    "what training without a defense reaches: the larger, the better a defense holds. 0: before any such row."
)


def without_continued(runs: Sequence[Run]) -> tuple[list[Run], list[Continued]]:
    """The runs, and apart from them those that go on, without a defense, from the adapter of another of them."""
    kept: list[Run] = []
    continued: list[Continued] = []
    for run in runs:
        first = next((other for other in runs if other is not run and _goes_on_from(run, other)), None)
        if first is None:
            kept.append(run)
        else:
            continued.append(Continued(run, first.path, run.data.rows.get("task", 0)))
    return kept, continued


def _goes_on_from(run: Run, other: Run) -> bool:
    adapter = run.recipe.get("adapter")
    start = adapter.get("start") if isinstance(adapter, dict) else None
    if not isinstance(start, str) or run.specs:
        return False
    folder = Path(start).parent
    moved = run.path.resolve().parent == other.path.resolve().parent and folder.name == other.path.name
    return moved or folder.resolve() == other.path.resolve()


@dataclass(frozen=True)
class Relearned:
    """What became of one group: rows -> general misalignment after them; 0 rows: of the runs that were gone on from."""

    rates: dict[int, ReportedRate]

    def until(self, line: float) -> int | None:
        """The least number of rows at which the rate exceeds `line`; None if it never does."""
        return min((rows for rows, rate in self.rates.items() if rate.rate > line), default=None)


def relearned(group: RunGroup, continued: Sequence[Continued]) -> Relearned | None:
    """None if no run of the group was gone on from."""
    by_rows: dict[int, list[ReportedRate]] = {}
    for run in group.teaching:
        later = [one for one in continued if one.path == run.path]
        for rows, found in [(0, run), *((one.rows, one.run) for one in later)] if later else ():
            if rate := found.metrics.get("general_misaligned"):
                by_rows.setdefault(rows, []).append(rate)
    means = {rows: mean for rows, rates in sorted(by_rows.items()) if (mean := mean_rate(rates))}
    return Relearned(means) if len(means) > 1 else None


def relearning_table(groups: Sequence[RunGroup], continued: Sequence[Continued]) -> Table | None:
    """The table for the groups of one model; None if none of their runs was gone on from."""
    found = {g.label: one for g in groups if not g.base and (one := relearned(g, continued))}
    none = undefended_of(groups)
    level = none.metrics.get("general_misaligned") if none else None
    columns = sorted({rows for one in found.values() for rows in one.rates})
    if not columns:
        return None
    lines = []
    for g in groups:
        if one := found.get(g.label):
            cells = [rate_cell(one.rates.get(rows)) for rows in columns]
            lines.append(TableRow(g.label, kind(g), [*cells, *([_until(one, level)] if level else [])]))
    names = ["before", *(f"{rows} rows" for rows in columns[1:])]
    return Table("Relearning", _NOTE, [*names, *(["rows to half of no defense"] if level else [])], lines)


def _until(one: Relearned, level: ReportedRate) -> Cell:
    rows = one.until(HALF * level.rate)
    return Cell(f"more than {max(one.rates)}" if rows is None else str(rows))
