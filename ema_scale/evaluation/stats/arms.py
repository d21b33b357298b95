"""An evaluation's answers as a comparison reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.evaluation.clusters import question_labels
from ema_scale.evaluation.judges.assignment import LIKELIHOOD
from ema_scale.evaluation.records import (
    SAMPLES_FILE,
    SUMMARY_FILE,
    QuestionSummary,
    Sample,
    SuiteSummary,
    Summary,
)
from ema_scale.evaluation.row_files import Judged
from ema_scale.evaluation.stats.choices import ChoiceOutcome
from ema_scale.evaluation.stats.rates import correct
from ema_scale.evaluation.store import Store
from ema_scale.evaluation.suites import topic_of

SAMPLING_SETTINGS = ("temperature", "top_p", "max_tokens")


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """One stored answer with its judgement; scores are 0 to 100 or None. All written answers of a question are one.

    Equal answers to one question may be one object.

    asked: the question's text, prompt and all.
    choice: of a question with written answers, whether a misaligned one is the likeliest, or in a benign suite a right
        one.
    margin: of such a question, log-likelihood of its good answers less that of the bad ones, in nats per token.
    loss: of a held-out row, in nats per token.
    """

    suite: str
    role: str
    condition: str | None
    question: str
    asked: str
    judge: str
    aligned: float | None
    coherent: float | None
    correct: bool | None
    alignment_asked: bool = True
    coherence_asked: bool = True
    scores: Mapping[str, float | None] = field(default_factory=dict)
    choice: bool | None = None
    margin: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Arm:
    """One target's evaluation.

    settings: how it was sampled.
    labels: (suite, question) -> by what its cluster is known, see `clusters`.
    seen: questions that its training rows ask; None where that is not known.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    rows: tuple[ArmAnswer, ...]
    labels: Mapping[tuple[str, str], tuple[Hashable, ...]]
    seen: frozenset[tuple[str, str]] | None = None

    @cached_property
    def counted(self) -> list[tuple[ArmAnswer, int]]:
        """Each object among the rows, in the order of first appearance, with how often it is there."""
        objects = {id(row): row for row in self.rows}
        return [(objects[number], count) for number, count in Counter(map(id, self.rows)).items()]


def labels_of(question: QuestionSummary) -> tuple[Hashable, ...]:
    """By what it is known that two questions of summaries are one cluster, those of older versions included."""
    topic = topic_of(question.id, question.topic)
    return question_labels(question.suite, topic, question.text or question.id, question.context or ())


def read_arm(path: Path) -> Arm:
    """The evaluation in a run folder, or in a folder that holds a summary.json.

    Raises UserError if there is none, or its files are not what an evaluation writes.
    """
    folder = next((f for f in (path / "eval", path) if (f / SUMMARY_FILE).is_file()), None)
    if folder is None:
        raise UserError(f"{path}: found no evaluation (eval/summary.json); run `ema eval {path}` first")
    try:
        summary = Summary.read(folder / SUMMARY_FILE)
        rows, last = _read_answers(folder, summary)
    except KeyError as error:
        raise UserError(f"{folder}: not a whole evaluation (its summary lacks the suite {error})") from None
    except UserError as error:
        raise UserError(f"{folder}: not a whole evaluation: {error}") from None
    if not rows:
        raise UserError(f"{folder}: {SAMPLES_FILE} holds no answers; run `ema eval {path}` again")
    name = summary.name if summary.source else path.parent.name if path.name == "eval" else path.name
    asked = {
        (suite, identity): question_labels(suite, topic_of(identity), question, context)
        for (suite, identity), (question, context) in last.items()
    }
    labels = asked | {(q.suite, q.id): labels_of(q) for q in summary.per_question}
    known = summary.adapter is None or summary.split is not None
    seen = frozenset((q.suite, q.id) for q in summary.per_question if q.seen) if known else None
    return Arm(name, path, {key: summary.sampler.get(key) for key in SAMPLING_SETTINGS}, rows, labels, seen)


def _read_answers(
    folder: Path, summary: Summary
) -> tuple[tuple[ArmAnswer, ...], dict[tuple[str, str], tuple[str, Sequence[dict[str, str]]]]]:
    """(answers, (suite, question id) -> text and context of the question)."""
    judgements, judges = Store(folder).judgements, summary.judges
    aligning = {judge for judge in judges if any(one.aligned is not None for one in judgements.in_use_by(judge))}
    rows, written, last = list[ArmAnswer](), list[Sample](), dict[tuple[str, str], tuple[str, Any]]()
    same: dict[tuple[Hashable, ...], ArmAnswer] = {}
    for _, sample in Sample.scan_fields(folder / SAMPLES_FILE):
        last[sample.suite, sample.question_id] = sample.question, sample.context or ()
        if sample.log_likelihood is not None:
            written.append(sample)
            continue
        judge, found = judgements.last_of(sample.key, judges) or ("", None)
        if found is not None and found.scores is not None:
            rows.append(_row(sample, summary.per_suite[sample.suite], judge, found, aligning))
            continue
        key = (sample.suite, sample.question_id, sample.prompt, judge, found)
        if key not in same:
            same[key] = _row(sample, summary.per_suite[sample.suite], judge, found, aligning)
        rows.append(same[key])
    rows += _written(written, summary)
    return tuple(rows), last


def _row(sample: Sample, suite: SuiteSummary, judge: str, judged: Judged | None, aligning: set[str]) -> ArmAnswer:
    benign = suite.role == "benign"
    return ArmAnswer(
        suite=sample.suite,
        role=suite.role,
        condition=suite.condition,
        question=sample.question_id,
        asked=sample.prompt,
        judge=judge,
        aligned=None if benign or not judged else judged.aligned,
        coherent=None if benign or not judged else judged.coherent,
        correct=correct(judged.label) if benign and judged else None,
        alignment_asked=judged is None or judge in aligning,
        coherence_asked=judged is None or judged.coherent is not None or judged.dropped is not None,
        scores=(judged.scores if judged else None) or {},
    )


def _written(samples: Sequence[Sample], summary: Summary) -> Iterator[ArmAnswer]:
    """A row per question with written answers."""
    questions: dict[tuple[str, str], list[Sample]] = {}
    for row in samples:
        questions.setdefault((row.suite, row.question_id), []).append(row)
    for (suite, question), answers in questions.items():
        answers.sort(key=lambda row: row.sample)
        role, condition = summary.per_suite[suite].role, summary.per_suite[suite].condition
        asked = "\n".join([answers[0].prompt, *(row.answer for row in answers)])
        outcome = ChoiceOutcome.of(answers)
        yield ArmAnswer(
            suite, role, condition, question, asked, LIKELIHOOD, None, None, None, False, choice=outcome.hit(role),
            margin=None if outcome.raw is None else outcome.raw.margin_per_token, loss=outcome.loss,
        )  # fmt: skip
