"""Means over runs, with intervals that do not pretend.

Runs of a study answer the same questions, so their errors are not independent, and a study seldom has many
seeds. The interval of a mean of R runs joins two parts by the square-and-add rule (Newcombe 1998; MOVER, Zou
and Donner 2008), each side for itself:

- within runs: the mean distance of the runs' own 95 % limits (clustered by question) from their rates. This
  is the limit for fully dependent errors, so more seeds on the same questions do not make it shrink;
- between runs, for R >= 3: the t interval of the R rates, R - 1 degrees of freedom. It holds the spread over
  seeds and tasks.

Both hold some of the same sampling noise, so the interval is rather too wide than too narrow. It is cut at 0
and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from scipy.stats import t as student

from ema_scale.report.display_names import family, spec_key, strength, without_strength
from ema_scale.report.records import METRICS, Collection, ReportedRate, Run

METHOD = (
    "A mark is the plain mean of the rates of that defense’s runs, over tasks and seeds. Its 95 % interval "
    "joins two parts by square-and-add (Newcombe 1998; MOVER): the runs’ own intervals, clustered by "
    "question and averaged as if fully dependent, because runs share questions; and, from three runs on, the "
    "t interval over runs, which holds the spread over seeds and tasks. With one or two runs that spread is "
    "not in the interval."
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


def mean_rate(rates: Sequence[ReportedRate], *, spread: bool = True) -> ReportedRate | None:
    """Mean of `rates` with the interval of this module; None if there is none.

    `spread=False` leaves out the between-runs part (parts of one run are no sample of runs).
    """
    if not rates:
        return None
    mean = fmean(r.rate for r in rates)
    below, above = fmean(r.rate - r.low for r in rates), fmean(r.high - r.rate for r in rates)
    runs = sum(r.runs for r in rates) if spread else 1
    between = 0.0
    if spread and len(rates) >= 3:
        between = float(student.ppf(0.975, len(rates) - 1)) * stdev(r.rate for r in rates) / math.sqrt(len(rates))
    return ReportedRate(
        mean,
        max(0.0, mean - math.hypot(below, between)),
        min(1.0, mean + math.hypot(above, between)),
        sum(r.n for r in rates),
        max(r.questions for r in rates),
        sum(r.dropped for r in rates),
        runs,
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
    for metric in METRICS:
        chosen = runs if metric == "benign_learned" else teaching
        metrics[metric] = mean_rate([rate for run in chosen if (rate := run.metrics.get(metric)) is not None])
    return metrics


def split_rate(group: RunGroup, metric: str, choice: str) -> ReportedRate | None:
    """The mean of a group over other questions than those of its metrics."""
    runs = group.runs if metric == "benign_learned" else group.teaching
    return mean_rate([rate for run in runs if (rate := run.split.get(choice, {}).get(metric))])


def groups(found: Collection, keep: Callable[[Run], bool] = lambda run: True) -> list[RunGroup]:
    """One group for each model and defense that has numbers: base, no defense, then by kind and strength."""
    cells: dict[tuple[str, bool, str], list[Run]] = {}
    for run in [*found.bases, *found.runs]:
        if any(run.metrics.values()) and keep(run):
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
