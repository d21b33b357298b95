"""What an evaluation leaves on disk: one type per file. The class that writes is the class that reads.

Reading is strict in types and keeps unknown keys of later versions. Fields that older versions did not write have
defaults. Every record has a schema version; a row without one is of schema 1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ema_scale.choices.bank import Label
from ema_scale.config.sections import EvaluationRecipe
from ema_scale.evaluation.record_types import ChoiceSummary, Document, Estimate, Mean, Power, Rate, Record, Row
from ema_scale.evaluation.reply_records import JudgeAlpha, JudgeUsage, UnreadReplies
from ema_scale.evaluation.suites import Suite

SAMPLES_FILE, JUDGEMENTS_FILE = "samples.jsonl", "judgements.jsonl"
SCORED = "scored"  # the finish reason of a written answer
SUMMARY_FILE, MANIFEST_FILE, CHECK_FILE = "summary.json", "asked.json", "check.json"
ENGINE_LOG = "engine.log"


class Sample(Row):
    """One answer, a row of samples.jsonl.

    key: suite/question/paraphrase/number#digest, unique in its folder.
    context: the turns before the question; not set if there are none.
    answer: without its reasoning, unless `reasoning` is not set (result CSVs, and old rows): then with it.
    tokens: how many tokens were sampled, or scored; None if that is not known.
    label: of a written answer; None for a sampled one.
    log_likelihood: of a written answer behind its question, a sum over its tokens in nats.
    log_likelihood_alone: the same without the question, if that was asked for.
    """

    key: str
    target: str = ""
    suite: str
    condition: str | None = None
    question_id: str
    paraphrase: int = 0
    sample: int = 0
    system: str | None = None
    context: list[dict[str, str]] | None = None
    question: str
    answer: str
    reasoning: str | None = None
    finish_reason: str | None = "stop"
    tokens: int | None = None
    seed: int | None = None
    label: Label | None = None
    log_likelihood: float | None = None
    log_likelihood_alone: float | None = None

    @property
    def prompt(self) -> str:
        """System prompt, context and question: answers with the same prompt are not independent."""
        return f"{self.system or ''}\n{self.asked}"

    @property
    def asked(self) -> str:
        """The question, after the turns before it where there are some: what judges and readers are shown."""
        if not self.context:
            return self.question
        turns = [*self.context, {"role": "user", "content": self.question}]
        return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


class Judgement(Row):
    """What one judge says of one answer, a row of judgements.jsonl.

    aligned, coherent: 0 to 100, or None.
    scores: those of prompts with other names, 0 to 100 or None; None if there are no such prompts.
    label: a verdict in words.
    dropped: why a score is missing.
    scored: how a 0-100 judge's scores were read ("expectation" or "number said"); None for exact judges.
    raw: the replies of a 0-100 judge, {prompt: {"said": text, "top": [[token, log-probability], ...]}}.
    usage: calls and tokens that it took, {"calls", "input_tokens", "output_tokens"}; None where nothing was paid for.
    """

    key: str
    judge: str
    aligned: float | None = None
    coherent: float | None = None
    scores: dict[str, float | None] | None = None
    label: str | None = None
    dropped: str | None = None
    scored: str | None = None
    raw: dict[str, dict[str, Any]] | None = None
    usage: dict[str, int] | None = None

    def to_row(self) -> dict[str, Any]:
        """Every field, ready for JSON; `raw`, `scores` and `usage` only where there are some."""
        absent = {name for name in ("raw", "scores", "usage") if getattr(self, name) is None}
        return self.model_dump(by_alias=True, exclude={"schema_version"} | absent)

    @property
    def coherence_asked(self) -> bool:
        """Whether coherence was asked for. Where it was not, a low `aligned` score alone makes an answer misaligned."""
        return self.coherent is not None or self.dropped is not None


class GateResult(Record):
    """Whether a base model may serve as a reference.

    state: one of those in `gate`.
    line: the largest share of misaligned answers that passes.
    action: "refuse" or "flag".
    """

    state: str
    line: float
    action: str
    text: str


class RateVariants(Record):
    """General misalignment counted in other ways.

    misaligned_at: Misalign@k by k.
    thresholds: name of the threshold -> [(threshold, rate), ...].
    power: None with fewer than two questions of two answers each.
    """

    coherent_only: Rate
    all_answers: Rate
    misaligned_at: dict[str, Rate] = {}
    thresholds: dict[str, list[tuple[float, float]]] = {}
    power: Power | None = None


class SplitRates(Record):
    """Rates of seen and unseen questions apart, each by the name that it has among the rates of all questions.

    unseen: of questions that no training row asks. seen: of the others. None where there is no such question.
    unseen_domains: of questions whose domain no training row touches; None where not all rows and questions name
        their domain.
    """

    unseen: dict[str, Rate | None]
    seen: dict[str, Rate | None]
    unseen_domains: dict[str, Rate | None] | None = None


class ConditionSummary(Record):
    """The general rates under one condition. own: the target was trained under it. split: see Summary."""

    name: str
    system: str | None = None
    user: str | None = None
    own: bool = False
    misaligned: Rate | None = None
    incoherent: Rate | None = None
    choices: Rate | None = Field(None, exclude_if=lambda value: value is None)
    split: SplitRates | None = Field(None, exclude_if=lambda value: value is None)


class SuiteSummary(Record):
    """The rates of one suite.

    condition: the name of the condition under which it was asked.
    scores: the means of prompts with other names than aligned and coherent.
    verdict_scores: the means of aligned and coherent, where the judge gives them.
    choices: of questions with written answers, the share of which a misaligned one is the likeliest; in a benign suite,
        a right one.
    likelihoods: all figures of its written answers.
    loss: of held-out rows, the mean over rows of the loss of their answers, in nats per token.
    split_loss: the same of "unseen" and "seen" rows apart; {} where training rows ask none of them, and where that is
        not known.
    split: see Summary.
    """

    role: str
    condition: str | None = None
    misaligned: Rate | None = None
    incoherent: Rate | None = None
    learned: Rate | None = None
    choices: Rate | None = Field(None, exclude_if=lambda value: value is None)
    likelihoods: ChoiceSummary | None = Field(None, exclude_if=lambda value: value is None)
    loss: Mean | None = Field(None, exclude_if=lambda value: value is None)
    split_loss: dict[str, Mean] = Field({}, exclude_if=lambda value: not value)
    scores: dict[str, Mean] = Field({}, exclude_if=lambda value: not value)
    verdict_scores: dict[str, Mean] = Field({}, exclude_if=lambda value: not value)
    samples: int = 0
    split: SplitRates | None = Field(None, exclude_if=lambda value: value is None)


class QuestionSummary(Record):
    """The outcome of one question. misaligned, incoherent, correct: shares in [0, 1], None where no answer has a value.

    topic: shared by the forms of one question; None in summaries of older versions.
    context: the turns before the question; None if there are none.
    n: answers.
    dropped: answers without a score.
    judged: answers with a value, by outcome (misaligned, incoherent, correct); {} in earlier versions.
    domain: what the bank says that it is about.
    choice: of a question with written answers, 1 if a misaligned one (in a benign suite, a right one) is the likeliest,
        else 0; None for others.
    said: of a next-token question, what was said -> its share, the likeliest first.
    margin_per_token, calibrated_margin_per_token: of such a question, see `ChoiceFigures`.
    loss: of a held-out row, nats per token of its answer.
    seen: whether a training row asks it; None where that is not known, and of a base model.
    """

    suite: str
    role: str
    condition: str | None = None
    id: str
    topic: str | None = Field(None, exclude_if=lambda value: value is None)
    context: list[dict[str, str]] | None = Field(None, exclude_if=lambda value: value is None)
    text: str = ""
    n: int = 0
    misaligned: float | None = None
    incoherent: float | None = None
    correct: float | None = None
    dropped: int = 0
    choice: float | None = Field(None, exclude_if=lambda value: value is None)
    margin_per_token: float | None = Field(None, exclude_if=lambda value: value is None)
    calibrated_margin_per_token: float | None = Field(None, exclude_if=lambda value: value is None)
    loss: float | None = Field(None, exclude_if=lambda value: value is None)
    said: dict[str, float] = Field({}, exclude_if=lambda value: not value)
    judged: dict[str, int] = Field({}, exclude_if=lambda value: not value)
    domain: str | None = Field(None, exclude_if=lambda value: value is None)
    seen: bool | None = Field(None, exclude_if=lambda value: value is None)


class Summary(Document):
    """The result of one target's evaluation, summary.json.

    adapter: None for a base model.
    base: the base model's evaluation folder, relative to this file's; None if there is none, and in schema 1.
    source: the result file that the answers were read from; None if they were sampled here.
    sampler: its own description, with name, temperature, top_p and max_tokens.
    superseded: answers that the recipe no longer asks for.
    legacy: whether it was counted as the paper's own evaluator counts; True, or None.
    metrics: the paper's criteria (`METRICS`) -> rate, None where the recipe has no such suite; and those of written
        answers, where the recipe has some.
    likelihoods: role -> the figures of all its written answers under no condition.
    split: the metrics of seen and unseen questions apart; None for a base model, and where the training rows are not
        known.
    trained_rows, trained_domains: rows that the run was given by part, and what they are about, where that is known.
    general_variants: of unseen questions, where that is known and there are any.
    dropped: reason -> answers.
    scored_by: how scores were read -> answers.
    notes: what a reader of the rates has to know.
    judge: the identities of the judges, joined by ", ".
    unread: None if every reply could be read.
    judge_usage: None if no judgement was paid for.
    gate: only for a base model that was asked something plainly.
    """

    VERSION: ClassVar[int] = 2
    OMITTED_IF_NONE: ClassVar[tuple[str, ...]] = ("legacy", "gate", "base", "source", "trained_rows", "trained_domains")

    schema_version: int = Field(2, alias="schema")
    name: str
    model: str
    adapter: str | None
    base: str | None = None
    source: str | None = None
    sampler: dict[str, Any]
    superseded: int = 0
    seconds: float = 0.0
    seed: int | None = None
    samples: int = 0
    legacy: bool | None = None
    metrics: dict[str, Rate | None]
    likelihoods: dict[str, ChoiceSummary] = Field({}, exclude_if=lambda value: not value)
    split: SplitRates | None = Field(None, exclude_if=lambda value: value is None)
    trained_rows: dict[str, int] | None = None
    trained_domains: list[str] | None = None
    interval: str = ""
    general_variants: RateVariants | None = None
    conditions: list[ConditionSummary] = []
    per_suite: dict[str, SuiteSummary]
    per_question: list[QuestionSummary] = []
    dropped: dict[str, int] = {}
    scored_by: dict[str, int] = {}
    notes: list[str] = Field([], exclude_if=lambda value: not value)
    judge: str
    unread: UnreadReplies | None = Field(None, exclude_if=lambda value: value is None)
    judge_usage: JudgeUsage | None = Field(None, exclude_if=lambda value: value is None)
    gate: GateResult | None = None

    def base_dir(self, folder: Path) -> Path | None:
        """The folder of the base model's evaluation, for a summary that lies in `folder`."""
        return None if self.base is None else Path(os.path.normpath(folder / self.base))

    @property
    def judges(self) -> list[str]:
        return self.judge.split(", ")


class Agreement(Record):
    """How far two opinions about the same answers agree. None where undefined.

    answers: those on which both have a verdict.
    same: the share of equal verdicts.
    kappa, kappa_misaligned: Cohen's, over all verdicts, and over misaligned or not.
    correlation_aligned, correlation_coherent: Spearman's, of the scores.
    """

    answers: int
    questions: int
    without_verdict: int
    same: Rate | None
    kappa: Estimate | None
    kappa_misaligned: Estimate | None
    correlation_aligned: Estimate | None
    correlation_coherent: Estimate | None


class RepeatAgreement(Agreement):
    """A judge against itself. score_change: mean absolute difference of the aligned scores, in points."""

    score_change: float | None = None


class JudgePairAgreement(Agreement):
    """Two judges of the same answers, by their identities."""

    one: str
    two: str


class JudgeQuality(Record):
    """One judge against labelled answers, and against itself.

    judged, expected: judgements that are there, and that there should be.
    labels: agreement with the labels.
    misaligned_found: the share of misaligned answers that it calls so.
    false_alarms: the share of the others that it calls misaligned.
    confusion: label -> the judge's verdict -> judgements.
    """

    judged: int
    expected: int = Field(alias="of")
    labels: Agreement
    misaligned_found: Rate
    false_alarms: Rate
    confusion: dict[str, dict[str, int]]
    repeated: RepeatAgreement


class LabelledFile(Record):
    """Which labelled answers were judged. labels: label -> answers."""

    file: str
    sha256: str
    answers: int
    labels: dict[str, int]


class Check(Document):
    """How good the judges are, judge_check/check.json. judges: by identity. between: pairs that judged the same.
    together: all 0-100 judges of the same answers; None with fewer than two.
    """

    MADE_BY: ClassVar[str] = "ema judge check"
    OMITTED_IF_NONE: ClassVar[tuple[str, ...]] = ("labelled", "between", "together")

    labelled: LabelledFile | None = None
    judges: dict[str, JudgeQuality] = {}
    between: list[JudgePairAgreement] | None = None
    together: JudgeAlpha | None = None


class Manifest(Document):
    """What a target was asked, asked.json: enough to judge its answers again.

    adapter: its folder, None for a base model.
    settings: the recipe's evaluation section.
    source: the result file that the answers were read from; None if they were sampled here.
    template_date: the date that the chat template was told, if it writes one.
    sampler: what answered, as it describes itself, once something was sampled.
    keys: what the answers' keys rest on. None: also on the path of the base model (before version 0.2).
    """

    OMITTED_IF_NONE: ClassVar[tuple[str, ...]] = ("source", "template_date", "sampler", "keys")

    target: str
    model: str
    adapter: str | None
    settings: EvaluationRecipe
    suites: tuple[Suite, ...]
    source: str | None = None
    template_date: str | None = None
    sampler: dict[str, Any] | None = None
    keys: str | None = None


def read_rows(folder: Path) -> tuple[list[Sample], list[Judgement]]:
    """The answers and judgements in an evaluation folder. Raises UserError naming a line that is neither."""
    return Sample.read_all(folder / SAMPLES_FILE), Judgement.read_all(folder / JUDGEMENTS_FILE)
