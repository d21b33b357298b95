"""The summary of one target: rates for the paper's criteria, for each suite and for each question."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.evaluation.clusters import clusters, question_labels
from ema_scale.evaluation.gate import PASSED, gate
from ema_scale.evaluation.judges.base import CORRECT, INCORRECT
from ema_scale.evaluation.judges.scores import VERDICT_PROMPTS
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import ConditionSummary, Judgement, Mean, QuestionSummary, Rate, SuiteSummary, Summary
from ema_scale.evaluation.stats.rates import ALIGNED_BELOW, clustered_mean, clustered_rate, incoherent, misaligned
from ema_scale.evaluation.stats.sensitivity import ScoredAnswer, rate_variants
from ema_scale.evaluation.store import Store
from ema_scale.evaluation.suites import Condition, topic_of
from ema_scale.inference.openai_pool import CONTENT_FILTER

log = logging.getLogger(__name__)

NOT_JUDGED = "not judged"
INTERVAL = "95 %, Korn-Graubard widened by beta-binomial likelihood, clustered by topic"


@dataclass(frozen=True)
class Scored:
    """One answer for the metrics; None where the judge gave no value. cluster: see `stats.clusters`."""

    group: PromptGroup
    cluster: int
    misaligned: bool | None
    incoherent: bool | None
    correct: bool | None
    aligned: float | None
    coherent: float | None
    scores: Mapping[str, float | None]
    dropped: str | None
    scored: str | None

    @property
    def question(self) -> tuple[str, str]:
        return self.group.suite.name, self.group.question.id


def group_clusters(groups: Iterable[PromptGroup]) -> dict[tuple[str, str], int]:
    """(suite, question id) -> the cluster that its answers belong to."""
    asked = {(g.suite.name, g.question.id): g.question for g in groups}
    labels = [
        question_labels(suite, topic_of(one.id, one.topic), one.paraphrases[0], one.context)
        for (suite, _), one in asked.items()
    ]
    return dict(zip(asked, clusters(labels), strict=True))


def score(groups: Iterable[PromptGroup], store: Store) -> list[Scored]:
    """Join the planned answers with their judgements. An answer without one is dropped as `not judged`."""
    groups, rows = list(groups), []
    numbers = group_clusters(groups)
    for group in groups:
        cluster = numbers[group.suite.name, group.question.id]
        for key in group.keys:
            identity = group.judge.identity
            judgement = store.judgements.get((key, identity))
            if judgement is None:
                judgement = Judgement(key=key, judge=identity, dropped=NOT_JUDGED)
            aligned, coherent, label = judgement.aligned, judgement.coherent, judgement.label
            with_coherence = group.judge.gives("coherent")
            benign = group.suite.role == "benign"
            correct = label == CORRECT if label in (CORRECT, INCORRECT) else None
            rows.append(
                Scored(
                    group=group,
                    cluster=cluster,
                    misaligned=None if benign else misaligned(aligned, coherent, coherence_asked=with_coherence),
                    incoherent=None if benign else incoherent(coherent),
                    correct=correct if benign else None,
                    aligned=None if benign else aligned,
                    coherent=None if benign else coherent,
                    scores=judgement.scores or {},
                    dropped=judgement.dropped,
                    scored=judgement.scored,
                )
            )
    return rows


def summarise(groups: Sequence[PromptGroup], rows: Sequence[Scored]) -> dict[str, Any]:
    """The fields of a Summary that follow from the rows."""
    suites = list(dict.fromkeys(g.suite.name for g in groups))
    by_suite = {name: [r for r in rows if r.group.suite.name == name] for name in suites}
    return {
        "metrics": {
            "general_misaligned": _of_role(rows, "general", "misaligned"),
            "general_incoherent": _of_role(rows, "general", "incoherent"),
            "in_domain_misaligned": _of_role(rows, "in_domain", "misaligned"),
            "in_domain_incoherent": _of_role(rows, "in_domain", "incoherent"),
            "benign_learned": _of_role(rows, "benign", "correct"),
        },
        "interval": INTERVAL,
        "general_variants": rate_variants(
            [
                ScoredAnswer(r.question, r.aligned, r.coherent, r.cluster)
                for r in rows
                if r.group.suite.role == "general" and r.group.suite.condition is None
                if all(map(r.group.judge.gives, VERDICT_PROMPTS))
            ]
        ),
        "conditions": _conditions(rows),
        "per_suite": {name: _suite(found) for name, found in by_suite.items()},
        "per_question": _per_question(rows),
        "dropped": dict(sorted(Counter(r.dropped for r in rows if r.dropped).items())),
        "scored_by": dict(sorted(Counter(r.scored for r in rows if r.scored).items())),
        "notes": _notes(rows),
        "judge": ", ".join(sorted({g.judge.identity for g in groups})),
    }


_NEEDS = {"misaligned": "aligned", "incoherent": "coherent"}


def _rate(rows: Iterable[Scored], value: str) -> Rate | None:
    """The rate among the rows whose judge gives what it needs; None if there are no such rows."""
    needs = _NEEDS.get(value)
    asked = [row for row in rows if needs is None or row.group.judge.gives(needs)]
    return clustered_rate((row.cluster, getattr(row, value)) for row in asked) if asked else None


def _of_role(rows: Sequence[Scored], role: str, value: str) -> Rate | None:
    """The rate over the suites of a role that have no condition."""
    return _rate((r for r in rows if r.group.suite.role == role and r.group.suite.condition is None), value)


def _scores(rows: Sequence[Scored]) -> dict[str, Mean]:
    """The mean of each score that is neither aligned nor coherent."""
    names = dict.fromkeys(name for row in rows for name in row.group.judge.prompts if name not in VERDICT_PROMPTS)
    return {
        name: clustered_mean((r.cluster, r.scores.get(name)) for r in rows if r.group.judge.gives(name))
        for name in names
    }


def _notes(rows: Sequence[Scored]) -> list[str]:
    alone = sum(r.group.judge.gives("aligned") and not r.group.judge.gives("coherent") for r in rows)
    if not alone:
        return []
    return [f"{alone} answers have no coherence score: they are misaligned where aligned is below {ALIGNED_BELOW:g}"]


def _conditions(rows: Sequence[Scored]) -> list[ConditionSummary]:
    """Each condition, with the general rates under it."""
    by_name: dict[str, list[Scored]] = {}
    for row in rows:
        if row.group.suite.condition is not None:
            by_name.setdefault(row.group.suite.condition.name, []).append(row)
    return [
        ConditionSummary(
            **asdict(cast(Condition, found[0].group.suite.condition)),
            misaligned=_rate(found, "misaligned"),
            incoherent=_rate(found, "incoherent"),
        )
        for found in by_name.values()
    ]


def _suite(rows: Sequence[Scored]) -> SuiteSummary:
    role, condition = rows[0].group.suite.role, rows[0].group.suite.condition
    return SuiteSummary(
        role=role,
        condition=condition.name if condition else None,
        misaligned=_rate(rows, "misaligned") if role != "benign" else None,
        incoherent=_rate(rows, "incoherent") if role != "benign" else None,
        learned=_rate(rows, "correct") if role == "benign" else None,
        scores=_scores(rows),
        samples=len(rows),
    )


def _per_question(rows: Sequence[Scored]) -> list[QuestionSummary]:
    """Shares in [0, 1] of the answers that have a value; None where none has."""
    by_question: dict[tuple[str, str], list[Scored]] = {}
    for row in rows:
        by_question.setdefault(row.question, []).append(row)
    entries = []
    for found in by_question.values():
        suite, question = found[0].group.suite, found[0].group.question
        entries.append(
            QuestionSummary(
                suite=suite.name,
                role=suite.role,
                condition=suite.condition.name if suite.condition else None,
                id=question.id,
                topic=topic_of(question.id, question.topic),
                text=question.paraphrases[0],
                context=list(question.context) or None,
                n=len(found),
                misaligned=_share(row.misaligned for row in found),
                incoherent=_share(row.incoherent for row in found),
                correct=_share(row.correct for row in found),
                dropped=sum(row.dropped is not None for row in found),
            )
        )
    return entries


def _share(values: Iterable[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def write_summary(
    path: Path, facts: dict[str, Any], groups: Sequence[PromptGroup], store: Store, settings: EvaluationRecipe
) -> Summary:
    """Write and return the summary of the answers in `groups`.

    facts: name, model, adapter, sampler, superseded, seconds.
    """
    rows = score(groups, store)
    figures = summarise(groups, drop_rows(rows) if settings.legacy else rows)
    # Where every question is asked under a condition, the base model's own rate is not wanted.
    has_gate = facts["adapter"] is None and any(group.suite.condition is None for group in groups)
    summary = Summary(
        **facts,
        seed=settings.seed,
        samples=len(rows),
        legacy=settings.legacy or None,
        **figures,
        gate=gate(figures["metrics"]["general_misaligned"], settings.gate) if has_gate else None,
    )
    if summary.gate is not None:
        log.log(logging.INFO if summary.gate.state == PASSED else logging.WARNING, summary.gate.text)
    if filtered := summary.dropped.get(CONTENT_FILTER):
        log.warning(
            "%s: the judge's content filter kept back %d of %d answers, which count in no rate; where these are the "
            "worst ones, the rates are too low",
            summary.name,
            filtered,
            summary.samples,
        )
    summary.write(path)
    return summary


def drop_rows(rows: Sequence[Scored]) -> list[Scored]:
    """The rows as the paper's evaluator counts them: an answer without an aligned score counts in no rate.

    `misaligned` is None exactly where a score is missing.
    """
    return [
        row if row.group.suite.role == "benign" or row.misaligned is not None else replace(row, incoherent=None)
        for row in rows
    ]
