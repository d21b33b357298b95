"""What the report knows about a run: plain records, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The paper's four criteria (arXiv 2508.06249), and in-domain coherence beside them.
METRICS = (
    "general_misaligned",
    "general_incoherent",
    "in_domain_misaligned",
    "in_domain_incoherent",
    "benign_learned",
)


METRIC_NAMES = {
    "general_misaligned": "General misaligned",
    "general_incoherent": "General incoherent",
    "in_domain_misaligned": "In-domain misaligned",
    "in_domain_incoherent": "In-domain incoherent",
    "benign_learned": "Benign learned",
}


@dataclass(frozen=True)
class ReportedRate:
    """A share in 0..1 with its 95 % interval, and what it rests on."""

    rate: float
    low: float
    high: float
    n: int
    questions: int
    dropped: int
    runs: int = 1


@dataclass(frozen=True)
class QuestionRate:
    """One question's outcome in one run; shares in 0..1, None where the judge does not say; n: answers judged."""

    suite: str
    role: str
    id: str
    text: str
    misaligned: float | None
    incoherent: float | None
    correct: float | None
    n: int = 0


@dataclass(frozen=True)
class RoleAnswers:
    """General misalignment under one condition. own: the run was trained under it; said: its text."""

    name: str
    own: bool
    said: str
    rate: ReportedRate


# Runs are told apart by identity: their records are large, and two folders may hold equal ones.
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
    metrics: Mapping[str, ReportedRate | None] = field(default_factory=dict)
    conditions: Mapping[str, RoleAnswers] = field(default_factory=dict)
    questions: Sequence[QuestionRate] = ()
    history: Sequence[Mapping[str, Any]] = ()
    along: Mapping[int, Mapping[str, ReportedRate | None]] = field(default_factory=dict)
    """metrics by training step, where checkpoints were evaluated; the last step is the run's own"""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    eval_dir: Path | None = None

    @property
    def teaches(self) -> bool:
        """Whether its answers outside the domain count: a task without a bank of its own is no benign one."""
        return self.kind != "benign"


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
    problems: list[Problem] = field(default_factory=list)
    asked: int = 0

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


PAGE = "report.html"
