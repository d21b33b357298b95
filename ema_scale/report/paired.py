"""Each defense against no defense, question by question: both answered the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ema_scale.core.text import points
from ema_scale.evaluation.stats.paired import METHOD, Counts, Difference, paired_difference
from ema_scale.report.aggregate import RunGroup
from ema_scale.report.records import METRIC_NAMES, METRICS, Run
from ema_scale.report.table import Cell, Table, TableRow

_VALUES = {"misaligned": "misaligned", "incoherent": "incoherent", "learned": "correct"}
_NOTE = (
    "Percentage points more or less than without a defense, with 95 % intervals and p values, on the questions and "
    "tasks that both answered. Seeds of a task are pooled, so that their spread is not in these intervals; it is in "
    "the table of the criteria."
)
PairedTally = dict[tuple[str, str, str], tuple[float, int]]


"""(task, suite, question) -> (hits, answers with a value), over seeds"""


def paired_tally(runs: Sequence[Run], metric: str) -> PairedTally:
    """What `runs` answered that counts for `metric`."""
    role, _, outcome = metric.rpartition("_")
    found: PairedTally = {}
    for run in runs:
        for q in run.questions:
            share = getattr(q, _VALUES[outcome])
            judged = max(0, q.n - q.dropped)
            if q.role == role and share is not None and judged:
                hits, n = found.get((run.task, q.suite, q.id), (0.0, 0))
                found[run.task, q.suite, q.id] = (hits + round(share * judged), n + judged)
    return found


def against(group: RunGroup, none: RunGroup, metric: str) -> Difference | None:
    """The paired difference of one metric; None if they share no question."""
    ours, theirs = (paired_tally(g.runs if metric == "benign_learned" else g.teaching, metric) for g in (group, none))
    both = [key for key in ours if key in theirs]
    if not both:
        return None
    columns = (np.array([side[key][i] for key in both], dtype=float) for side in (ours, theirs) for i in (0, 1))
    return paired_difference(Counts(*columns))


def paired_table(groups: Sequence[RunGroup]) -> Table | None:
    """The table for the groups of one model; None without a run that has no defense, or without another."""
    none = next((g for g in groups if g.undefended), None)
    others = [g for g in groups if not g.base and not g.undefended]
    if none is None or not others:
        return None
    lines = [TableRow(g.label, "defense", [_cell(against(g, none, metric)) for metric in METRICS]) for g in others]
    if not any(cell for line in lines for cell in line.cells):
        return None
    names = [METRIC_NAMES[metric] for metric in METRICS]
    return Table("Against no defense, question by question", _NOTE, names, lines, METHOD)


def _cell(found: Difference | None) -> Cell | None:
    if found is None:
        return None
    p = f"p = {found.p:.3f}" if found.p >= 0.001 else "p < 0.001"
    return Cell(points(found.value), f"[{points(found.low)}, {points(found.high)}]", p)
