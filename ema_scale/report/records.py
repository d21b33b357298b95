"""What the report knows about a run: plain records, no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ema_scale.core.records import DataReport, Provenance
from ema_scale.evaluation.records import QuestionSummary, Rate, Summary

# The paper's four criteria (arXiv 2508.06249), and in-domain coherence beside them.
METRIC_NAMES = {
    "general_misaligned": "General misaligned",
    "general_incoherent": "General incoherent",
    "in_domain_misaligned": "In-domain misaligned",
    "in_domain_incoherent": "In-domain incoherent",
    "benign_learned": "Benign learned",
}
METRICS = tuple(METRIC_NAMES)
CHOICE_METRICS = ("general_choices", "in_domain_choices", "benign_choices")  # of written answers
PAGE = "report.html"
UNSEEN, SEEN, ALL = "unseen", "seen", "all"
NEW_DOMAINS, KNOWN_DOMAINS = "in unseen domains", "in seen domains"
CHOICES = (SEEN, ALL, NEW_DOMAINS, KNOWN_DOMAINS)


@dataclass(frozen=True)
class ReportedRate:
    """A rate that is known: of one run, or the mean of several. Shares in 0..1 with a 95 % interval.

    seeds: half of the interval of the spread over seeds, which is in `low` and `high`.
    any_task: the interval for tasks in general; None from fewer than three tasks.
    """

    rate: float
    low: float
    high: float
    n: int
    questions: int
    dropped: int
    runs: int = 1
    seeds: float = 0.0
    any_task: tuple[float, float] | None = None


Metrics = dict[str, ReportedRate | None]


def known_rate(rate: Rate | None) -> ReportedRate | None:
    """A rate of a summary; None if no answer has a value. Raises ValueError if the interval is none."""
    if rate is None or rate.rate is None:
        return None
    if rate.low is None or rate.high is None or not 0 <= rate.low <= rate.rate <= rate.high <= 1:
        raise ValueError(f"found {rate.to_dict()}, expected 0 <= low <= rate <= high <= 1")
    return ReportedRate(rate.rate, rate.low, rate.high, rate.n, rate.questions, rate.dropped)


def known_rates(rates: Iterable[Rate | None]) -> list[ReportedRate]:
    """Those that are known and sound."""
    known = []
    for rate in rates:
        with suppress(ValueError):
            known.append(known_rate(rate))
    return [rate for rate in known if rate]


def has_numbers(summary: Summary | None) -> bool:
    """Whether it has a rate, a loss of held-out rows, or a score of a judge prompt of another name than aligned and
    coherent."""
    return summary is not None and (
        any(summary.metrics.values()) or any(suite.scores or suite.loss for suite in summary.per_suite.values())
    )


@dataclass(frozen=True)
class ConditionAnswers:
    """General misalignment under one condition.

    Args:
        own: whether the run was trained under it.
        text: what is said before each question.
    """

    name: str
    own: bool
    text: str
    rate: ReportedRate


# Compared by identity: records are large, and two folders may hold equal ones.
@dataclass(frozen=True, eq=False)
class Run:
    """One run folder, or (`base`) the untouched model on the questions of one task."""

    path: Path
    name: str
    model: str
    task: str
    seed: int | None
    specs: tuple[Mapping[str, Any], ...]
    label: str
    kind: str
    """narrow | benign | unknown: which questions the task itself has; unknown: none of its own"""
    base: bool = False
    metrics: Metrics = field(default_factory=dict)
    """of unseen questions, where that is known: see `report.unseen`"""
    split: Mapping[str, Metrics] = field(default_factory=dict)
    """the metrics of other choices of questions: seen ones, all, those of unseen domains"""
    conditions: Mapping[str, ConditionAnswers] = field(default_factory=dict)
    questions: Sequence[QuestionSummary] = ()
    history: Sequence[Mapping[str, Any]] = ()
    along: Mapping[int, Metrics] = field(default_factory=dict)
    """metrics by training step, where checkpoints were evaluated; the last step is the run's own"""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    summary: Summary | None = None
    data: DataReport = field(default_factory=DataReport)
    eval_dir: Path | None = None

    @property
    def teaches(self) -> bool:
        """Whether its answers outside the domain count: a task without a bank of its own is no benign one."""
        return self.kind != "benign"


@dataclass(frozen=True, eq=False)
class Continued:
    """A run without a defense that goes on from the adapter of another, for so many rows.

    Args:
        path: the folder of the run that it goes on from.
    """

    run: Run
    path: Path
    rows: int


@dataclass(frozen=True)
class Problem:
    """Something a reader must know about one run."""

    run: str
    state: str
    """failed, running, stopped, not started, not evaluated, or note"""
    text: str


@dataclass
class Collection:
    """Everything read. `runs` count in the means; `problems` lists what does not, and why."""

    runs: list[Run] = field(default_factory=list)
    bases: list[Run] = field(default_factory=list)
    continued: list[Continued] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    requested: int = 0
    seen: dict[str, str] = field(default_factory=dict)
    """how many of the questions training rows ask, by task"""

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.runs))

    @property
    def tasks(self) -> list[str]:
        """Narrow tasks first, each kind in name order."""
        order = ("narrow", "unknown", "benign")
        kinds: dict[str, int] = {}
        for run in self.runs:
            kinds[run.task] = min(order.index(run.kind), kinds.get(run.task, len(order)))
        return sorted(kinds, key=lambda task: (kinds[task], task))
