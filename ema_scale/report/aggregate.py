"""Means over runs, with intervals that say what they speak of.

Runs of a study answer the same questions, so their errors are not independent, and a study seldom has many seeds or
tasks. The mean of a defense is the mean over its tasks of the means over each task's seeds. It has two intervals, each
side for itself by the square-and-add rule (Newcombe 1998; MOVER, Zou and Donner 2008):

- over these tasks: the runs' own intervals (clustered by question), averaged, joined with the t interval of the seeds,
  whose variance is pooled within tasks;
- over tasks in general, as which these were drawn: the same, joined with the t interval of the tasks' means. From
  three tasks on.

The runs' own distances are averaged as those of fully dependent errors, so more seeds on the same questions do not make
them shrink. The parts hold some of the same sampling noise, so the intervals are rather too wide than too narrow. They
are cut at 0 and 1. docs/statistics.md has the coverage by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from scipy.special import stdtrit

from ema_scale.report.display_names import family, spec_key, strength, without_strength
from ema_scale.report.records import CHOICE_METRICS, METRICS, Collection, ReportedRate, Run, has_numbers

METHOD = (
    "A mark is the mean of a defense’s runs: seeds are averaged within each task, then the tasks. Its 95 % interval "
    "speaks of these tasks. It joins two parts by square-and-add (Newcombe 1998; MOVER): the runs’ own intervals, "
    "clustered by question and averaged as if fully dependent, because runs share questions; and the t interval of the "
    "seeds, pooled within tasks. With fewer than two seeds more than tasks, that spread is not in the interval. From "
    "three tasks on, “any task” is the interval for tasks in general, with the t interval of the tasks’ means. The "
    "forms of one question (plain, JSON, template) count as one question."
)
_KINDS = ("kl", "interleaving", "ldifs", "safelora", "steering", "inoculation")


@dataclass(frozen=True)
class GroupDifference:
    """first - second in 0..1 units with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class RunGroup:
    """All runs of one defense on one model."""

    model: str
    label: str
    base: bool
    family: tuple[str, ...]
    strength: float | None
    sweep: str | None
    """equal for defenses that differ only in their strength; None where that means nothing"""
    runs: Sequence[Run] = field(repr=False)
    metrics: dict[str, ReportedRate | None] = field(repr=False)
    teaching: Sequence[Run] = field(default=(), repr=False)
    """those of `runs` whose numbers are in the means, but for benign learning, which comes from all"""

    @property
    def undefended(self) -> bool:
        return not self.base and not self.family


def base_of(groups: Iterable[RunGroup]) -> RunGroup | None:
    """The aligned base of one model's groups; None if it was not evaluated."""
    return next((g for g in groups if g.base), None)


def undefended_of(groups: Iterable[RunGroup]) -> RunGroup | None:
    """The runs without a defense of one model's groups; None if there are none."""
    return next((g for g in groups if g.undefended), None)


LEAST_FREEDOM = 2
"""Degrees of freedom below which a spread is not told from noise: with one, t is 12.7."""


def _t_limit(freedom: int) -> float:
    return float(stdtrit(freedom, 0.975))


def mean_rate(
    rates: Sequence[ReportedRate], tasks: Sequence[str] | None = None, *, spread: bool = True
) -> ReportedRate | None:
    """Mean of `rates` with the intervals of this module; None if there is none.

    Args:
        tasks: the task of each rate; None: they are all of one.
        spread: False leaves out the spread over seeds and tasks (parts of one run are no sample of runs).
    """
    if not rates:
        return None
    by_task: dict[str, list[ReportedRate]] = {}
    for rate, task in zip(rates, tasks or [""] * len(rates), strict=True):
        by_task.setdefault(task, []).append(rate)
    cells = list(by_task.values())
    means = [fmean(r.rate for r in cell) for cell in cells]
    mean = fmean(means)
    below = fmean(fmean(r.rate - r.low for r in cell) for cell in cells)
    above = fmean(fmean(r.high - r.rate for r in cell) for cell in cells)
    seeds = 0.0
    freedom = len(rates) - len(cells)
    if spread and freedom >= LEAST_FREEDOM:
        squares = sum((r.rate - m) ** 2 for cell, m in zip(cells, means, strict=True) for r in cell)
        variance = squares / freedom * sum(1 / len(cell) for cell in cells) / len(cells) ** 2
        seeds = _t_limit(freedom) * math.sqrt(variance)
    in_general = None
    if spread and len(cells) > LEAST_FREEDOM:
        over_tasks = max(seeds, _t_limit(len(cells) - 1) * stdev(means) / math.sqrt(len(cells)))
        in_general = (max(0.0, mean - math.hypot(below, over_tasks)), min(1.0, mean + math.hypot(above, over_tasks)))
    return ReportedRate(
        mean,
        max(0.0, mean - math.hypot(below, seeds)),
        min(1.0, mean + math.hypot(above, seeds)),
        sum(r.n for r in rates),
        max(r.questions for r in rates),
        sum(r.dropped for r in rates),
        sum(r.runs for r in rates) if spread else 1,
        seeds,
        in_general,
    )


def difference(first: ReportedRate, second: ReportedRate) -> GroupDifference:
    """first - second by square-and-add, as for independent rates.

    Rates on the same questions move together, so the interval is rather too wide than too narrow.
    """
    value = first.rate - second.rate
    low = value - math.hypot(first.rate - first.low, second.high - second.rate)
    high = value + math.hypot(first.high - first.rate, second.rate - second.low)
    return GroupDifference(value, max(-1.0, low), min(1.0, high))


def group_metrics(runs: Sequence[Run], teaching: Sequence[Run]) -> dict[str, ReportedRate | None]:
    """The five metrics of one defense: benign learning from all of its runs that measured it, the others from those on
    tasks that are not benign (`teaching`)."""
    metrics = {}
    for metric in (*METRICS, *CHOICE_METRICS):
        chosen = [run for run in (runs if metric == "benign_learned" else teaching) if run.metrics.get(metric)]
        metrics[metric] = mean_rate([rate for run in chosen if (rate := run.metrics[metric])], [r.task for r in chosen])
    return metrics


def split_rate(group: RunGroup, metric: str, choice: str) -> ReportedRate | None:
    """The mean of a group over other questions than those of its metrics."""
    runs = group.runs if metric == "benign_learned" else group.teaching
    found = [(rate, run.task) for run in runs if (rate := run.split.get(choice, {}).get(metric))]
    return mean_rate([rate for rate, _ in found], [task for _, task in found])


def groups(found: Collection, keep: Callable[[Run], bool] = lambda run: True) -> list[RunGroup]:
    """One group for each model and defense that has numbers: base, no defense, then by kind and strength."""
    cells: dict[tuple[str, bool, str], list[Run]] = {}
    for run in [*found.bases, *found.runs]:
        if (any(run.metrics.values()) or has_numbers(run.summary)) and keep(run):
            cells.setdefault((run.model, run.base, spec_key(run.specs)), []).append(run)
    # Of a model, not of a defense: one that was tried on benign tasks alone would look safer than the others.
    taught = {run.model for runs in cells.values() for run in runs if run.teaches}
    made = []
    for (model, base, _), runs in cells.items():
        specs = runs[0].specs
        teaching = [run for run in runs if run.teaches or model not in taught]
        numbers = [s for spec in specs if (s := strength(spec)) is not None]
        made.append(
            RunGroup(
                model,
                runs[0].label,
                base,
                family(specs),
                numbers[0] if len(specs) == 1 and numbers else None,
                without_strength(specs[0]) if len(specs) == 1 and numbers else None,
                runs,
                group_metrics(runs, teaching),
                teaching,
            )
        )
    models = found.models
    return sorted(made, key=lambda g: (models.index(g.model), *_order(g)))


def _order(group: RunGroup) -> tuple[int, int, list[tuple[int, str]], list[float], str]:
    kinds = [(_KINDS.index(k) if k in _KINDS else len(_KINDS), k) for k in group.family]
    numbers = [strength(spec) or 0.0 for spec in group.runs[0].specs]
    return (0 if group.base else 1, len(group.family), kinds, numbers, group.label)
