"""The summary of one target: rates for the paper's criteria, for each suite and for each question."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.evaluation.gate import PASSED, gate
from ema_scale.evaluation.judges.base import CORRECT, INCORRECT
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import ConditionSummary, Judgement, QuestionSummary, Rate, SuiteSummary, Summary
from ema_scale.evaluation.stats.rates import clustered_rate, incoherent, misaligned
from ema_scale.evaluation.stats.sensitivity import ScoredAnswer, rate_variants
from ema_scale.evaluation.store import Store
from ema_scale.evaluation.suites import Condition
from ema_scale.inference.openai_pool import CONTENT_FILTER

log = logging.getLogger(__name__)

NOT_JUDGED = "not judged"
INTERVAL = "95 %, Korn-Graubard widened by beta-binomial profile likelihood, clustered by question"


@dataclass(frozen=True)
class Scored:
    """One answer as the metrics see it; None where the judge does not say."""

    group: PromptGroup
    misaligned: bool | None
    incoherent: bool | None
    correct: bool | None
    aligned: float | None
    coherent: float | None
    dropped: str | None
    scored: str | None

    @property
    def cluster(self) -> str:
        return f"{self.group.suite.name}/{self.group.question.id}"

    @property
    def asked(self) -> str:
        """What was asked: two suites may hold the same question, whose answers are then one cluster."""
        return repr(self.group.question.messages(0))


def score(groups: Iterable[PromptGroup], store: Store) -> list[Scored]:
    """Join the planned answers with their judgements. An answer without one is dropped as `not judged`."""
    rows = []
    for group in groups:
        for key in group.keys:
            identity = group.judge.identity
            judgement = store.judgements.get((key, identity))
            if judgement is None:
                judgement = Judgement(key=key, judge=identity, dropped=NOT_JUDGED)
            aligned, coherent, label = judgement.aligned, judgement.coherent, judgement.label
            benign = group.suite.role == "benign"
            correct = label == CORRECT if label in (CORRECT, INCORRECT) else None
            rows.append(
                Scored(
                    group=group,
                    misaligned=None if benign else misaligned(aligned, coherent),
                    incoherent=None if benign else incoherent(coherent),
                    correct=correct if benign else None,
                    aligned=None if benign else aligned,
                    coherent=None if benign else coherent,
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
                ScoredAnswer(r.asked, r.aligned, r.coherent)
                for r in rows
                if r.group.suite.role == "general" and r.group.suite.condition is None
            ]
        ),
        "conditions": _conditions(rows),
        "per_suite": {name: _suite(found) for name, found in by_suite.items()},
        "per_question": _per_question(rows),
        "dropped": dict(sorted(Counter(r.dropped for r in rows if r.dropped).items())),
        "scored_by": dict(sorted(Counter(r.scored for r in rows if r.scored).items())),
        "judge": ", ".join(sorted({g.judge.identity for g in groups})),
    }


def _rate(rows: Iterable[Scored], value: str) -> Rate:
    return clustered_rate((row.asked, getattr(row, value)) for row in rows)


def _of_role(rows: Sequence[Scored], role: str, value: str) -> Rate | None:
    """The rate over plainly asked suites of a role: what is said under a condition counts apart."""
    asked = [row for row in rows if row.group.suite.role == role and row.group.suite.condition is None]
    return _rate(asked, value) if asked else None


def _conditions(rows: Sequence[Scored]) -> list[ConditionSummary]:
    """For each condition: what was said, whether the target was trained under it, and the general rates."""
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
        samples=len(rows),
    )


def _per_question(rows: Sequence[Scored]) -> list[QuestionSummary]:
    """Shares in [0, 1] of the answers that have a value; None where none has."""
    clusters: dict[str, list[Scored]] = {}
    for row in rows:
        clusters.setdefault(row.cluster, []).append(row)
    entries = []
    for found in clusters.values():
        suite, question = found[0].group.suite, found[0].group.question
        entries.append(
            QuestionSummary(
                suite=suite.name,
                role=suite.role,
                condition=suite.condition.name if suite.condition else None,
                id=question.id,
                text=question.paraphrases[0],
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
    """An answer without an aligned score counts in no rate: `misaligned` is None exactly where a score is missing."""
    return [
        row if row.group.suite.role == "benign" or row.misaligned is not None else replace(row, incoherent=None)
        for row in rows
    ]
