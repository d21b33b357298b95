"""Questions that a run was trained on, and rates without them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ema_scale.core.records import TrainedQuestions
from ema_scale.core.text import quantity
from ema_scale.evaluation.clusters import clusters
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import Mean, QuestionSummary, Rate, SplitRates, Summary
from ema_scale.evaluation.stats.arms import labels_of
from ema_scale.evaluation.stats.choices import unbounded_mean
from ema_scale.evaluation.stats.rates import counted_rate

OUTCOMES = {"misaligned": "misaligned", "incoherent": "incoherent", "learned": "correct", "choices": "choice"}
Answers = tuple[int, str | None, bool | None, int]
Counted = Sequence[Answers]
"""(cluster, domain of the question, value, how many answers have it) of everything that a rate is made of"""


class Clustered(Protocol):
    """An answer that knows the cluster of its question."""

    @property
    def cluster(self) -> int: ...


Row = TypeVar("Row", bound=Clustered)


@dataclass(frozen=True)
class SeenQuestions:
    """Which of the asked questions stand in a run's training rows.

    clusters: cluster of questions -> whether a row asks one of them, None where that is not known; {} if nothing is.
        Forms of one question are seen together.
    domains: those that the rows touch; None unless every row names its own.
    """

    clusters: Mapping[int, bool | None]
    domains: frozenset[str] | None

    @classmethod
    def of(cls, groups: Iterable[tuple[int, PromptGroup]], trained: TrainedQuestions | None) -> SeenQuestions:
        """groups: each with its cluster. trained: None if the training rows are not known."""
        if trained is None:
            return cls({}, None)
        clusters: dict[int, bool | None] = {}
        for cluster, group in groups:
            found, before = trained.has(group.question.paraphrases), clusters.get(cluster, False)
            clusters[cluster] = True if found or before else None if None in (found, before) else False
        return cls(clusters, trained.domains)

    def split(self, counted: Mapping[str, Counted]) -> SplitRates | None:
        """The rates of seen and unseen questions apart, by name; None unless it is known of every question."""
        if not self.clusters or None in self.clusters.values():
            return None

        def apart(seen: bool) -> dict[str, Rate | None]:
            return {
                name: rate_of(one for one in rows if self.clusters[one[0]] is seen) for name, rows in counted.items()
            }

        return SplitRates(unseen=apart(False), seen=apart(True), unseen_domains=self._unseen_domains(counted))

    def unseen(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Those of `rows` whose questions are unseen; all where that is not known, or none is."""
        return [row for row in rows if self.clusters.get(row.cluster) is False] or rows

    def _unseen_domains(self, counted: Mapping[str, Counted]) -> dict[str, Rate | None] | None:
        domains = self.domains
        if domains is None:
            return None
        rates = {
            name: None
            if any(domain is None for _, domain, _, _ in rows)
            else rate_of(one for one in rows if one[1] not in domains)
            for name, rows in counted.items()
        }
        return rates if any(rates.values()) else None


def rate_of(counted: Iterable[Answers]) -> Rate | None:
    """The rate over some answers; None without any."""
    rows = [(cluster, value, count) for cluster, _, value, count in counted]
    return counted_rate(rows) if rows else None


def suite_of(question: QuestionSummary) -> str:
    """The suite of a question, whatever the condition under which it was asked."""
    return question.suite.removesuffix(f"@{question.condition}") if question.condition else question.suite


def of_questions(summary: Summary, kept: Collection[tuple[str, str]]) -> Summary:
    """The summary of some of its questions, each (suite, id), under all conditions: rates are counted anew.

    Ways of counting that need single answers (`general_variants`) stay those of all questions.
    """
    questions = [q for q in summary.per_question if (suite_of(q), q.id) in kept]
    suites = {
        name: suite.model_copy(
            update={
                key: rate_among(found, outcome) if getattr(suite, key) is not None else None
                for key, outcome in OUTCOMES.items()
            }
            | {"samples": sum(q.n for q in found)}
            | losses(found)
        )
        for name, suite in summary.per_suite.items()
        if (found := [q for q in questions if q.suite == name])
    }
    conditions = [
        condition.model_copy(
            update={key: rate_among(found, OUTCOMES[key]) for key in ("misaligned", "incoherent", "choices")}
        )
        for condition in summary.conditions
        if (found := [q for q in questions if q.condition == condition.name])
    ]
    metrics = {
        name: rate_among([q for q in questions if q.role == role and not q.condition], OUTCOMES[outcome])
        for name in summary.metrics
        for role, _, outcome in [name.rpartition("_")]
    }
    return summary.model_copy(
        update={"metrics": metrics, "per_suite": suites, "conditions": conditions, "per_question": questions}
    )


def rate_among(questions: Sequence[QuestionSummary], outcome: str) -> Rate | None:
    """The rate of an outcome (misaligned, incoherent, correct) over some questions; None if none has answers."""
    questions = [q for q in questions if (q.choice is not None) == (outcome == "choice")]
    numbers = clusters(map(labels_of, questions))
    return rate_of(row for pair in zip(questions, numbers, strict=True) for row in _answers(*pair, outcome))


def loss_among(questions: Sequence[QuestionSummary]) -> Mean | None:
    """The mean loss of the held-out rows among some questions; None without any."""
    questions = [q for q in questions if q.loss is not None]
    numbers = clusters(map(labels_of, questions))
    return unbounded_mean([(n, q.loss or 0.0) for n, q in zip(numbers, questions, strict=True)]) if questions else None


def losses(questions: Sequence[QuestionSummary]) -> dict[str, Any]:
    """The fields `loss` and `split_loss` of a suite's summary."""
    sides = {"unseen": False, "seen": True} if {q.seen for q in questions} in ({True}, {True, False}) else {}
    apart = {name: loss_among([q for q in questions if q.seen is side]) for name, side in sides.items()}
    return {"loss": loss_among(questions), "split_loss": {name: mean for name, mean in apart.items() if mean}}


def loss_notes(questions: Sequence[QuestionSummary]) -> list[str]:
    """How many held-out rows of each suite training rows ask, where they ask some."""
    seen = [(q.suite, q.seen is True) for q in questions if q.loss is not None]
    return [
        f"{suite}: training rows ask what {count} of {quantity(seen.count((suite, False)) + count, 'held-out row')} ask"
        for suite in dict.fromkeys(suite for suite, _ in seen)
        if (count := seen.count((suite, True)))
    ]


def _answers(question: QuestionSummary, cluster: int, outcome: str) -> Iterator[Answers]:
    share = getattr(question, outcome)
    judged = 0 if share is None else question.judged.get(outcome, question.n - question.dropped)
    hits = round((share or 0) * judged)
    total = 1 if outcome == "choice" else question.n  # all written answers are one
    judged = min(judged, total)
    hits = min(hits, judged)
    for value, count in ((True, hits), (False, judged - hits), (None, total - judged)):
        if count:
            yield cluster, question.domain, value, count
