"""Each defense against no defense, question by question: both answered the same ones."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from ema_scale.core.text import points, spreadsheet_cell
from ema_scale.evaluation.clusters import clusters
from ema_scale.evaluation.records import QuestionSummary
from ema_scale.evaluation.stats.arms import labels_of
from ema_scale.evaluation.stats.difference import METHOD, Difference, holm, paired_difference
from ema_scale.evaluation.stats.paired import by_cluster, compare_means
from ema_scale.report.aggregate import GroupDifference, RunGroup, base_of, difference, mean_rate, undefended_of
from ema_scale.report.records import METRIC_NAMES, METRICS, ReportedRate, Run
from ema_scale.report.table import Cell, Table, TableRow

_VALUES = {"misaligned": "misaligned", "incoherent": "incoherent", "learned": "correct"}
_NOTE = (
    "Percentage points (of margins and losses: nats per token) more or less than without a defense, with 95 % "
    "intervals, on the questions and tasks that both answered. Seeds of a task are pooled, so their spread is not in "
    "these intervals; those of mean rates have it. p values are corrected for the number of defenses (Holm)."
)
DIFFERENCES = "model,defense,against,measure,unit,difference,low,high,p,p_holm,questions"
NATS = "nats per token"
HELD_OUT = "held_out"
ROLES = {"general": "General", "in_domain": "In-domain", "benign": "Benign"}
Asked = tuple[str, str, str]
"""task, suite, question"""


def paired_tally(runs: Sequence[Run], metric: str) -> dict[Asked, tuple[float, int, tuple[Hashable, ...]]]:
    """What `runs` answered that counts for `metric`: hits and answers with a value, over seeds, and the labels by which
    a question's cluster is known."""
    role, _, outcome = metric.rpartition("_")
    found: dict[Asked, tuple[float, int, tuple[Hashable, ...]]] = {}
    for run in runs:
        for q in run.questions:
            share = getattr(q, _VALUES[outcome])
            judged = max(0, q.n - q.dropped)
            if q.role == role and share is not None and judged:
                key = (run.task, q.suite, q.id)
                hits, n, labels = found.get(key, (0.0, 0, labels_of(q)))
                found[key] = (hits + round(share * judged), n + judged, labels)
    return found


def counted(group: RunGroup, metric: str) -> Sequence[Run]:
    """The runs whose answers are in the group's mean of a metric."""
    return group.runs if metric == "benign_learned" else group.teaching


def against(group: RunGroup, none: RunGroup, metric: str) -> Difference | None:
    """The paired difference of one metric; None if they share no question.

    The unit is the question with all its forms, whatever task a run was trained on.
    """
    ours, theirs = (paired_tally(counted(g, metric), metric) for g in (group, none))
    both = [key for key in ours if key in theirs]
    if not both:
        return None
    units = clusters(ours[key][2] for key in both)
    rows = [(unit, *ours[key][:2], *theirs[key][:2]) for unit, key in zip(units, both, strict=True)]
    return paired_difference(by_cluster(rows))


def change(group: RunGroup, other: RunGroup, metric: str) -> GroupDifference | None:
    """group - other in the mean over the tasks of both, with the spread over seeds; None if one lacks the metric.

    The interval joins that of the paired questions with those of both arms' seeds by square-and-add. Without shared
    questions it is that of independent rates.
    """
    mine, theirs = (_over(g, metric, _tasks(group, metric) & _tasks(other, metric)) for g in (group, other))
    if mine is None or theirs is None:
        return None
    paired = against(group, other, metric)
    if paired is None:
        return difference(mine, theirs)
    value = mine.rate - theirs.rate
    low = value - math.hypot(paired.value - paired.low, mine.seeds, theirs.seeds)
    high = value + math.hypot(paired.high - paired.value, mine.seeds, theirs.seeds)
    return GroupDifference(value, max(-1.0, low), min(1.0, high))


def _tasks(group: RunGroup, metric: str) -> set[str]:
    return {run.task for run in counted(group, metric) if run.metrics.get(metric)}


def _over(group: RunGroup, metric: str, tasks: set[str]) -> ReportedRate | None:
    """The group's mean over some of its tasks; over all, if there are none to choose from."""
    found = [(rate, r.task) for r in counted(group, metric) if r.task in tasks and (rate := r.metrics.get(metric))]
    return mean_rate([r for r, _ in found], [t for _, t in found]) if found else group.metrics.get(metric)


def margin_name(role: str) -> str:
    """How tables and figures name the margin of a role's written answers."""
    return f"{ROLES[role]}: margin"


@dataclass(frozen=True)
class Measure:
    """A value of questions in nats per token: a margin of written answers, or a loss of held-out rows.

    role: of its questions. title: as figures name it. name: as tables name it.
    """

    role: str
    title: str
    name: str
    value: Callable[[QuestionSummary], float | None]


def measures(groups: Sequence[RunGroup]) -> list[Measure]:
    """Margins by role and losses by suite, of those that some run was asked."""
    asked = [q for g in groups for run in g.runs for q in run.questions]
    margins = {q.role for q in asked if q.margin_per_token is not None}
    suites = dict.fromkeys(q.suite for q in asked if q.loss is not None)
    titles = {role: margin_name(role) for role in ROLES if role in margins}
    return [
        *(Measure(role, title, title, partial(_margin, role)) for role, title in titles.items()),
        *(Measure(HELD_OUT, suite, f"Held-out loss, {suite}", partial(_loss, suite)) for suite in suites),
    ]


def mean_against(group: RunGroup, other: RunGroup, measure: Measure) -> Difference | None:
    """The paired difference of a measure; None if they share fewer than two questions. The seeds of a
    task are averaged question by question."""
    ours, theirs = (_values(g.runs, measure) for g in (group, other))
    both = [key for key in ours if key in theirs]
    units = clusters(ours[key][1] for key in both)
    rows = [(unit, fmean(ours[key][0]), 1, fmean(theirs[key][0]), 1) for unit, key in zip(units, both, strict=True)]
    found = compare_means("mean", rows)
    return None if found is None else found.difference


def _margin(role: str, question: QuestionSummary) -> float | None:
    return question.margin_per_token if question.role == role and question.condition is None else None


def _loss(suite: str, question: QuestionSummary) -> float | None:
    return question.loss if question.suite == suite else None


def _values(runs: Sequence[Run], measure: Measure) -> dict[Asked, tuple[list[float], tuple[Hashable, ...]]]:
    found: dict[Asked, tuple[list[float], tuple[Hashable, ...]]] = {}
    for run in runs:
        for q in run.questions:
            if (one := measure.value(q)) is not None:
                found.setdefault((run.task, q.suite, q.id), ([], labels_of(q)))[0].append(one)
    return found


def corrected(found: Sequence[Difference | None]) -> list[Difference | None]:
    """The same differences from one arm, with p values corrected for their number."""
    p_values = iter(holm([one.p for one in found if one is not None]))
    return [None if one is None else replace(one, holm=next(p_values)) for one in found]


@dataclass(frozen=True)
class Column:
    """One metric or measure of some groups, less that of another group.

    name: as tables name it. unit: `share` or `nats per token`. found: a difference per group, with Holm's p.
    """

    name: str
    unit: str
    found: Sequence[Difference | None]


@dataclass(frozen=True)
class Comparison:
    """Groups of one model against another group of it, by all that some of them shares with it."""

    groups: Sequence[RunGroup]
    other: RunGroup
    columns: Sequence[Column]


def comparisons(groups: Sequence[RunGroup]) -> list[Comparison]:
    """One model's groups against its aligned base, and against no defense."""
    found = []
    for other in (base_of(groups), undefended_of(groups)):
        if other is not None:
            rest = [g for g in groups if not g.base and g is not other]
            rates = ((METRIC_NAMES[m], "share", [against(g, other, m) for g in rest]) for m in METRICS)
            means = ((one.name, NATS, [mean_against(g, other, one) for g in rest]) for one in measures(groups))
            columns = [Column(name, unit, corrected(row)) for name, unit, row in (*rates, *means) if any(row)]
            found.append(Comparison(rest, other, columns))
    return found


def paired_table(found: Sequence[Comparison]) -> Table | None:
    """The table of one model's comparison with no defense; None without such a one, or without anything in it."""
    one = next((one for one in found if one.other.undefended), None)
    if one is None or not one.columns:
        return None
    cells = [[nats_cell(d) if column.unit == NATS else _cell(d) for d in column.found] for column in one.columns]
    lines = [TableRow(g.label, "defense", row) for g, row in zip(one.groups, zip(*cells, strict=True), strict=True)]
    names = [column.name for column in one.columns]
    return Table("Against no defense, question by question", _NOTE, names, lines, METHOD)


def differences_csv(found: Sequence[Comparison]) -> str:
    """CSV text, a line per difference. Those of rates are shares in -1..1."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(DIFFERENCES.split(","))
    for one in found:
        for column in one.columns:
            for g, d in zip(one.groups, column.found, strict=True):
                if d is not None:
                    names = map(spreadsheet_cell, (g.model, g.label, one.other.label, column.name))
                    numbers = (d.value, d.low, d.high, d.p, d.corrected_p)
                    writer.writerow([*names, column.unit, *(f"{n:.6f}" for n in numbers), d.questions])
    return out.getvalue()


def _cell(found: Difference | None, form: Callable[[float], str] = points) -> Cell | None:
    if found is None:
        return None
    p = f"p = {found.corrected_p:.3f}" if found.corrected_p >= 0.001 else "p < 0.001"
    return Cell(form(found.value), f"[{form(found.low)}, {form(found.high)}]", p)


def nats_cell(found: Difference | None) -> Cell | None:
    """A difference in nats per token, with its interval and, below, p."""
    return _cell(found, "{:+.3f}".format)
