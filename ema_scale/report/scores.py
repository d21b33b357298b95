"""Scores of judge prompts of any other name than aligned and coherent: their means, by defense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.special import stdtrit

from ema_scale.evaluation.record_types import Mean
from ema_scale.report.aggregate import RunGroup
from ema_scale.report.table import Cell, Table, TableRow, kind

NOTE = (
    "Means of the scores that judge prompts of other names give, in their own points, with 95 % intervals clustered by "
    "question. They count in no rate."
)


def score_table(groups: Sequence[RunGroup]) -> Table | None:
    """The table for the groups of one model, a column per score and bank; None without such scores."""
    columns = dict.fromkeys(
        (score, suite)
        for g in groups
        for run in g.runs
        if run.summary
        for suite, found in run.summary.per_suite.items()
        for score in found.scores
    )
    if not columns:
        return None
    lines = [TableRow(g.label, kind(g), [mean_cell(_means(g, *column), ".1f") for column in columns]) for g in groups]
    return Table("Other scores", NOTE, [f"{score}, {suite}" for score, suite in columns], lines)


def score_sentences(groups: Sequence[RunGroup]) -> list[str]:
    """What to say first where there is nothing else; [] without such scores."""
    return ["No rate of misalignment was measured: “Other scores” has what was."] if score_table(groups) else []


def mean_cell(means: Sequence[Mean], form: str) -> Cell | None:
    """The mean over runs, with the interval of `aggregate.mean_rate`: within runs, and between three or more.

    form: of a number, such as `.1f`.
    """
    means = [one for one in means if one.mean is not None]
    if not means:
        return None
    values = [m.mean for m in means if m.mean is not None]
    mean, within = fmean(values), [w for m in means if (w := _half(m)) is not None]
    if len(within) < len(means):
        return Cell(f"{mean:{form}}")
    between = 0.0
    if len(values) >= 3:
        between = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    half = math.hypot(fmean(within), between)
    return Cell(f"{mean:{form}}", f"[{mean - half:{form}}, {mean + half:{form}}]")


def _means(group: RunGroup, score: str, suite: str) -> list[Mean]:
    suites = [run.summary.per_suite.get(suite) for run in group.runs if run.summary]
    return [found.scores[score] for found in suites if found is not None and score in found.scores]


def _half(mean: Mean) -> float | None:
    return None if mean.high is None or mean.mean is None else mean.high - mean.mean
