"""The summary of one target: rates for the paper's criteria, for each suite and for each question."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from ema_scale.choices.bank import HELD_OUT
from ema_scale.config.sections import EvaluationRecipe
from ema_scale.core.records import TrainedQuestions
from ema_scale.core.run_dir import trained_questions
from ema_scale.evaluation.clusters import clusters, question_labels
from ema_scale.evaluation.gate import PASSED, gate
from ema_scale.evaluation.judges.readings import NEXT_TOKEN
from ema_scale.evaluation.judges.scores import VERDICT_PROMPTS
from ema_scale.evaluation.plan import PromptGroup, judged_by_bank
from ema_scale.evaluation.record_types import ChoiceSummary
from ema_scale.evaluation.records import (
    ConditionSummary,
    Mean,
    QuestionSummary,
    Rate,
    SuiteSummary,
    Summary,
)
from ema_scale.evaluation.reply_summary import reply_figures, warn_of_unread
from ema_scale.evaluation.row_files import Judged
from ema_scale.evaluation.seen import OUTCOMES, Counted, SeenQuestions, loss_notes, losses, rate_of
from ema_scale.evaluation.stats.choices import ChoiceOutcome, choice_summary
from ema_scale.evaluation.stats.rates import ALIGNED_BELOW, clustered_mean, correct, incoherent, misaligned
from ema_scale.evaluation.stats.sensitivity import ScoredAnswer, rate_variants
from ema_scale.evaluation.store import Store
from ema_scale.evaluation.suites import Condition, Role, topic_of
from ema_scale.inference.base import NOT_SAMPLED
from ema_scale.inference.completion import CONTENT_FILTER

log = logging.getLogger(__name__)

NOT_JUDGED = "not judged"
NO_SCORES: Mapping[str, float | None] = {}
INTERVAL = "95 %, Korn-Graubard widened by beta-binomial likelihood, clustered by topic"
CRITERIA = (
    ("general_misaligned", "general", "misaligned"),
    ("general_incoherent", "general", "incoherent"),
    ("in_domain_misaligned", "in_domain", "misaligned"),
    ("in_domain_incoherent", "in_domain", "incoherent"),
    ("benign_learned", "benign", "correct"),
)
CHOICE_CRITERIA = tuple((f"{role}_choices", role, "choice") for role in get_args(Role) if role != HELD_OUT)


@dataclass(frozen=True, slots=True)
class Scored:
    """Equal answers for the metrics; None where the judge gave no value. All written answers of a question are one.

    count: how many there are. Answers with further scores are rows of their own.
    cluster: see `stats.clusters`.
    likelihoods, choice: of written answers; see `QuestionSummary`.
    """

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
    likelihoods: ChoiceOutcome | None = None
    choice: bool | None = None
    said: str | None = None
    count: int = 1

    @property
    def question(self) -> tuple[str, str]:
        return self.group.suite.name, self.group.question.id

    @property
    def domain(self) -> str | None:
        """What the bank says that the question is about."""
        domain = self.group.question.meta.get("domain")
        return domain if isinstance(domain, str) else None


def group_clusters(groups: Iterable[PromptGroup]) -> dict[tuple[str, str], int]:
    """(suite, question id) -> the cluster that its answers belong to."""
    asked = {(g.suite.name, g.question.id): g.question for g in groups}
    labels = [
        question_labels(suite, topic_of(one.id, one.topic), one.paraphrases[0], one.context)
        for (suite, _), one in asked.items()
    ]
    return dict(zip(asked, clusters(labels), strict=True))


def score(groups: Iterable[PromptGroup], store: Store) -> list[Scored]:
    """Join the planned answers with their judgements, and written ones with each other.

    An answer without a judgement is dropped as `not judged` or `not sampled`.
    """
    groups, rows = list(groups), []
    numbers = group_clusters(groups)
    for group in groups:
        cluster = numbers[group.suite.name, group.question.id]
        if group.is_scored:
            rows.append(_written(group, cluster, store))
            continue
        benign = group.suite.role == "benign"
        with_coherence, says_tokens = group.judge.gives("coherent"), group.judge.kind == NEXT_TOKEN
        for judged, count in _counted_judgements(group, store):
            aligned, coherent, label = judged.aligned, judged.coherent, judged.label
            rows.append(
                Scored(
                    group=group,
                    cluster=cluster,
                    misaligned=None if benign else misaligned(aligned, coherent, coherence_asked=with_coherence),
                    incoherent=None if benign else incoherent(coherent),
                    correct=correct(label) if benign else None,
                    aligned=None if benign else aligned,
                    coherent=None if benign else coherent,
                    scores=judged.scores or NO_SCORES,
                    dropped=judged.dropped,
                    scored=judged.scored,
                    said=label if says_tokens else None,
                    count=count,
                )
            )
    return rows


def _counted_judgements(group: PromptGroup, store: Store) -> Iterable[tuple[Judged, int]]:
    """What the judge says of the answers of a group, equal judgements together, in the order of first appearance."""
    judgements, samples, identity = store.judgements, store.samples, group.judge.identity
    found: dict[int, list[Any]] = {}
    missing = {why: Judged(None, None, None, None, why, None, False) for why in (NOT_JUDGED, NOT_SAMPLED)}
    for key in group.keys:
        judged = judgements.judged(key, identity) or missing[NOT_JUDGED if key in samples else NOT_SAMPLED]
        found.setdefault(id(judged), [judged, 0])[1] += 1  # equal ones are one object unless they have further scores
    return ((judged, count) for judged, count in found.values())


def _written(group: PromptGroup, cluster: int, store: Store) -> Scored:
    found = ChoiceOutcome.of([store.samples[key] for key in group.keys])
    return Scored(group, cluster, None, None, None, None, None, {}, None, None, found, found.hit(group.suite.role))


def summarise(
    groups: Sequence[PromptGroup], rows: Sequence[Scored], trained: TrainedQuestions | None = None
) -> dict[str, Any]:
    """The fields of a Summary that follow from the rows. trained: what the target was trained on, if that is known."""
    seen = SeenQuestions.of({id(r.group): (r.cluster, r.group) for r in rows}.values(), trained)
    suites, questions = list(dict.fromkeys(g.suite.name for g in groups)), _per_question(rows, seen)
    by_suite = {name: [r for r in rows if r.group.suite.name == name] for name in suites}
    plain = [r for r in rows if r.group.suite.condition is None]
    written = [r for r in plain if r.likelihoods is not None]
    criteria = CRITERIA + tuple(c for c in CHOICE_CRITERIA if any(r.group.suite.role == c[1] for r in written))
    asked = {name: ([r for r in plain if r.group.suite.role == role], value) for name, role, value in criteria}
    general = seen.unseen(asked["general_misaligned"][0])
    return {
        "metrics": {name: _rate(found, value) for name, (found, value) in asked.items()},
        "likelihoods": {
            role: told for role in get_args(Role) if (told := _likelihoods(r for r in written if _role(r) == role))
        },
        "split": seen.split({name: _counted(found, value) for name, (found, value) in asked.items()}),
        "trained_rows": trained and {name: part.rows for name, part in trained.parts.items()},
        "trained_domains": None if seen.domains is None else sorted(seen.domains),
        "interval": INTERVAL,
        "general_variants": rate_variants(
            [
                ScoredAnswer(r.question, r.aligned, r.coherent, r.cluster, r.count)
                for r in general
                if all(map(r.group.judge.gives, VERDICT_PROMPTS))
            ]
        ),
        "conditions": _conditions(rows, seen),
        "per_suite": {name: _suite(found, questions, seen) for name, found in by_suite.items()},
        "per_question": questions,
        "dropped": dict(sorted(_tally((r.dropped, r.count) for r in rows if r.dropped).items())),
        "scored_by": dict(sorted(_tally((r.scored, r.count) for r in rows if r.scored).items())),
        "notes": [*loss_notes(questions), *_notes(rows)],
        "judge": ", ".join(sorted({g.judge.identity for g in groups})),
    }


def _tally(values: Iterable[tuple[str, int]]) -> Counter[str]:
    counts = Counter[str]()
    for value, count in values:
        counts[value] += count
    return counts


_NEEDS = {"misaligned": "aligned", "incoherent": "coherent"}


def _counted(rows: Iterable[Scored], value: str) -> Counted:
    """The answers that a rate is made of: those whose judge gives what it needs, or the questions with written ones."""
    needs = _NEEDS.get(value)
    asked = (
        row
        for row in rows
        if (row.likelihoods is not None) == (value == "choice") and (needs is None or row.group.judge.gives(needs))
    )
    return [(row.cluster, row.domain, getattr(row, value), row.count) for row in asked]


def _rate(rows: Iterable[Scored], value: str) -> Rate | None:
    return rate_of(_counted(rows, value))


def _role(row: Scored) -> str:
    return row.group.suite.role


def _likelihoods(rows: Iterable[Scored]) -> ChoiceSummary | None:
    return choice_summary([(row.cluster, row.likelihoods) for row in rows if row.likelihoods is not None])


def _answers(rows: Iterable[Scored]) -> int:
    return sum(row.count if row.likelihoods is None else row.likelihoods.answers for row in rows)


def _scores(rows: Sequence[Scored]) -> dict[str, Mean]:
    """The mean of each score that a judge was asked for."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row.group.judge.prompts):
        asked = [row for row in rows if row.group.judge.gives(name)]
        values = ((row.cluster, _score_of(row, name)) for row in asked for _ in range(row.count))
        found[name] = clustered_mean(values, *asked[0].group.judge.scale)
    return found


def _score_of(row: Scored, name: str) -> float | None:
    return getattr(row, name) if name in VERDICT_PROMPTS else row.scores.get(name)


def _notes(rows: Sequence[Scored]) -> list[str]:
    alone = sum(r.count for r in rows if r.group.judge.gives("aligned") and not r.group.judge.gives("coherent"))
    if not alone:
        return []
    return [f"{alone} answers have no coherence score: they are misaligned where aligned is below {ALIGNED_BELOW:g}"]


def _conditions(rows: Sequence[Scored], seen: SeenQuestions) -> list[ConditionSummary]:
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
            choices=_rate(found, "choice"),
            split=seen.split({value: _counted(found, value) for value in ("misaligned", "incoherent")}),
        )
        for found in by_name.values()
    ]


def _suite(rows: Sequence[Scored], questions: Sequence[QuestionSummary], seen: SeenQuestions) -> SuiteSummary:
    role, condition = rows[0].group.suite.role, rows[0].group.suite.condition
    values = {name: value for name, value in OUTCOMES.items() if (name == "learned") == (role == "benign")}
    values.pop("choices", None)
    if role != HELD_OUT and any(row.likelihoods is not None for row in rows):
        values["choices"] = "choice"
    means, own = _scores(rows), [q for q in questions if q.suite == rows[0].group.suite.name]
    figures: dict[str, Any] = {name: _rate(rows, value) for name, value in values.items()} | losses(own)
    return SuiteSummary(
        role=role,
        condition=condition.name if condition else None,
        **figures,
        scores={name: mean for name, mean in means.items() if name not in VERDICT_PROMPTS},
        verdict_scores={name: mean for name, mean in means.items() if name in VERDICT_PROMPTS and mean.n},
        likelihoods=_likelihoods(rows),
        samples=_answers(rows),
        split=seen.split({name: _counted(rows, value) for name, value in values.items()}),
    )


def _per_question(rows: Sequence[Scored], seen: SeenQuestions) -> list[QuestionSummary]:
    """Shares in [0, 1] of the answers that have a value; None where none has."""
    by_question: dict[tuple[str, str], list[Scored]] = {}
    for row in rows:
        by_question.setdefault(row.question, []).append(row)
    entries = []
    for found in by_question.values():
        suite, question, written = found[0].group.suite, found[0].group.question, found[0].likelihoods
        entries.append(
            QuestionSummary(
                suite=suite.name,
                role=suite.role,
                condition=suite.condition.name if suite.condition else None,
                id=question.id,
                topic=topic_of(question.id, question.topic),
                text=question.paraphrases[0],
                context=list(question.context) or None,
                n=_answers(found),
                misaligned=_share(found, "misaligned"),
                incoherent=_share(found, "incoherent"),
                correct=_share(found, "correct"),
                dropped=sum(row.count for row in found if row.dropped is not None),
                judged={value: n for value in OUTCOMES.values() if (n := _with_value(found, value))},
                choice=_share(found, "choice"),
                said=_said(found),
                margin_per_token=None if written is None or written.raw is None else written.raw.margin_per_token,
                calibrated_margin_per_token=(
                    None if written is None or written.calibrated is None else written.calibrated.margin_per_token
                ),
                loss=None if written is None else written.loss,
                domain=found[0].domain,
                seen=seen.clusters.get(found[0].cluster),
            )
        )
    return entries


MOST_SAID = 20


def _said(rows: Sequence[Scored]) -> dict[str, float]:
    """What was said to a next-token question, with its share of the answers."""
    counts = _tally((row.said, row.count) for row in rows if row.said is not None)
    return {text: count / counts.total() for text, count in counts.most_common(MOST_SAID)}


def _with_value(rows: Sequence[Scored], value: str) -> int:
    return sum(row.count for row in rows if getattr(row, value) is not None)


def _share(rows: Sequence[Scored], value: str) -> float | None:
    known = _with_value(rows, value)
    return sum(row.count for row in rows if getattr(row, value)) / known if known else None


def write_summary(
    path: Path,
    facts: dict[str, Any],
    groups: Sequence[PromptGroup],
    store: Store,
    settings: EvaluationRecipe,
    before: Summary | None = None,
) -> Summary:
    """Write and return the summary of the answers in `groups`.

    facts: name, model, adapter, source, sampler, superseded, seconds.
    before: the summary that is there. One that differs in nothing but `seconds` stays.
    """
    rows = score(groups, store)
    adapter = facts["adapter"]
    trained = None if adapter is None else trained_questions(adapter, path.parent)
    figures = summarise(groups, drop_rows(rows) if settings.legacy else rows, trained)
    if (elsewhere := judged_by_bank(groups, settings.judge)) is not None:
        figures["notes"].append(elsewhere)
    metrics = figures["metrics"]
    # Where every question is asked under a condition, the base model's own rate is not wanted.
    sampled = facts.get("source") is None
    has_gate = sampled and facts["adapter"] is None and any(group.suite.condition is None for group in groups)
    summary = Summary(
        **facts,
        seed=settings.seed,
        samples=_answers(rows),
        legacy=settings.legacy or None,
        **figures,
        **reply_figures(groups, store, settings.judge),
        gate=gate(metrics["general_misaligned"], settings.gate, metrics.get("general_choices")) if has_gate else None,
    )
    if summary.gate is not None:
        log.log(logging.INFO if summary.gate.state == PASSED else logging.WARNING, summary.gate.text)
    if filtered := summary.dropped.get(CONTENT_FILTER):
        log.warning(
            "%s: a content filter kept back %d of %d answers, which count in no rate; where these are the "
            "worst ones, the rates are too low",
            summary.name,
            filtered,
            summary.samples,
        )
    warn_of_unread(summary)
    if before is not None and before.model_copy(update={"seconds": summary.seconds}).to_json() == summary.to_json():
        return before
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
