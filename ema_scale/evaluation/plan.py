"""What an evaluation has to sample, and what is stored: every answer with its key, seed and judge."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_text
from ema_scale.core.hashing import digest, folder_identity
from ema_scale.core.user_code import is_file_spec
from ema_scale.evaluation.judges.assignment import EXACT, NOBODY, JudgeSpec, assign
from ema_scale.evaluation.records import MANIFEST_FILE, SCORED, Manifest, Sample
from ema_scale.evaluation.row_files import StoredAnswer
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.base import NOT_SAMPLED, SampleRequest, SampleResult, ScoreRequest, ScoreResult
from ema_scale.inference.make import sampler_cache_key
from ema_scale.inference.thoughts import split_reasoning

if TYPE_CHECKING:
    from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe, ModelRecipe


@dataclass(frozen=True)
class EvalTarget:
    """What is evaluated: the base model (`adapter_path=None`) or one adapter; `out_dir` gets its rows.

    suites: the target's own suites, in place of those of the evaluation.
    base_dir: the folder of the base model's evaluation, which the target's summary names.
    date: what a chat template that writes the date is told, YYYY-MM-DD; "": the date of earlier answers, else today.
    keys_by_path: whether the path of the base model counts in the keys of its answers, as in folders of versions before
        0.2. Otherwise an adapter is the same one wherever it lies.
    """

    name: str
    adapter_path: Path | None
    out_dir: Path
    suites: tuple[Suite, ...] | None = None
    base_dir: Path | None = None
    date: str = ""
    keys_by_path: bool = False

    @property
    def base(self) -> str | None:
        """`base_dir` relative to `out_dir`, so that a study may be moved."""
        return None if self.base_dir is None else os.path.relpath(self.base_dir, self.out_dir)


@dataclass(frozen=True)
class PromptGroup:
    """The answers to one paraphrase of one question by one target: they share prompt and settings."""

    target: EvalTarget
    suite: Suite
    question: Question
    paraphrase: int
    n: int
    digest: str
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    judge: JudgeSpec
    calibrate: bool = False

    @property
    def is_scored(self) -> bool:
        """Whether its answers are written ones, of which the likelihood is taken."""
        return bool(self.question.answers)

    @property
    def is_judged(self) -> bool:
        """Whether somebody judges its answers: written ones bring their verdicts, and some are only to be read."""
        return not self.is_scored and self.judge.kind != NOBODY

    def key(self, index: int) -> str:
        return self._keys((index,))[0]

    @property
    def keys(self) -> list[str]:
        return self._keys(range(self.n))

    def _keys(self, indices: Iterable[int]) -> list[str]:
        before, digest = f"{self.suite.name}/{self.question.id}/{self.paraphrase}/", self.digest
        return [f"{before}{index}#{digest}" for index in indices]

    def requests(self, done: Callable[[str], bool]) -> Iterator[tuple[int, SampleRequest]]:
        """(first index, request) for each run of answers that are not done."""
        index = 0
        while index < self.n:
            if done(self.key(index)):
                index += 1
                continue
            first = index
            while index < self.n and not done(self.key(index)):
                index += 1
            yield first, self._request(first, index - first)

    def _request(self, first: int, n: int) -> SampleRequest:
        adapter = self.target.adapter_path
        return SampleRequest(
            key=f"{self.target.name}|{self.key(first)}",
            messages=self.question.messages(self.paraphrase),
            adapter=None if adapter is None else str(adapter),
            n=n,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            seed=self.seed + first,
            date=self.target.date,
        )

    def score_request(self) -> ScoreRequest:
        """All written answers at once: they share their question."""
        adapter, source = self.target.adapter_path, self.suite.source or self.suite.name
        of_row = self.question.row
        return ScoreRequest(
            key=f"{self.target.name}|{self.key(0)}",
            messages=self.question.messages(self.paraphrase),
            answers=tuple(answer.text for answer in self.question.answers),
            adapter=None if adapter is None else str(adapter),
            alone=self.question.without_question() if self.calibrate else None,
            where=f"{source}:{self.question.id}" if of_row else f"{source}: question {self.question.id!r}",
            date=self.target.date,
            turn=of_row[-1] if of_row else {},
            tools=self.question.tools,
        )

    def _question_fields(self, number: int) -> dict[str, Any]:
        """What a row of samples.jsonl says of the question, for its answer of that number."""
        return {
            "key": self.key(number),
            "target": self.target.name,
            "suite": self.suite.name,
            "condition": self.suite.condition.name if self.suite.condition else None,
            "question_id": self.question.id,
            "paraphrase": self.paraphrase,
            "sample": number,
            "system": self.question.system,
            "question": self.question.paraphrases[self.paraphrase],
            **({"context": list(self.question.context)} if self.question.context else {}),
        }

    def scored_rows(self, result: ScoreResult) -> Iterator[Sample]:
        """The written answers with their likelihoods. Raises UserError for one that is no number."""
        totals = [value for one in result.likelihoods for value in (one.total, one.alone) if value is not None]
        if not all(map(math.isfinite, totals)):
            raise UserError(
                f"{self.target.name}: {self.suite.name}, question {self.question.id!r}: a log-likelihood is no finite "
                "number; look at the adapter's weights, or set model.dtype to float32"
            )
        for i, (answer, found) in enumerate(zip(self.question.answers, result.likelihoods, strict=True)):
            yield Sample(
                **self._question_fields(i),
                answer=answer.text,
                reasoning=None,
                finish_reason=SCORED,
                tokens=found.tokens,
                label=answer.label,
                log_likelihood=found.total,
                log_likelihood_alone=found.alone,
            )

    def rows(self, first: int, result: SampleResult) -> Iterator[Sample]:
        """The answers of a result whose first answer has index `first`; those not sampled are left out."""
        for i, (text, reason) in enumerate(zip(result.texts, result.finish_reasons, strict=True), start=first):
            if reason == NOT_SAMPLED:
                continue
            reasoning, answer, _ = split_reasoning(text)
            yield Sample(
                **self._question_fields(i),
                answer=answer,
                reasoning=None if answer == text else reasoning,  # "" for a thought that was opened and left empty
                finish_reason=reason,
                tokens=result.token_counts[i - first],
                seed=self.seed + i,
            )


def check_targets(targets: Sequence[EvalTarget], suites: Sequence[Suite]) -> None:
    """Raises UserError if two targets or suites share a name or folder, or there is nothing to do."""
    asked = [suites if t.suites is None else t.suites for t in targets]
    if not targets or not all(asked):
        raise UserError("evaluation: expected at least one target and one suite; set evaluation.suites")
    for what, names in (
        ("targets are called", [t.name for t in targets]),
        ("targets write to", [str(t.out_dir) for t in targets]),
        *(("suites are called", [s.name for s in found]) for found in asked),
    ):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise UserError(f"evaluation: two {what} {twice[0]}; expected different ones")
    for target in targets:
        adapter = target.adapter_path
        if adapter is not None and not (adapter / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: found no adapter_config.json, expected a PEFT adapter folder")


def as_stored(target: EvalTarget) -> EvalTarget:
    """The target with the date and the kind of keys that its earlier answers have."""
    stored = Manifest.read_if_valid(Path(target.out_dir) / MANIFEST_FILE)
    if stored is None:
        return target
    return replace(target, date=target.date or stored.template_date or "", keys_by_path=stored.keys is None)


def plan_prompts(
    targets: Iterable[EvalTarget],
    suites: Sequence[Suite],
    model: ModelRecipe,
    settings: EvaluationRecipe,
    sampler: str,
) -> list[PromptGroup]:
    """Everything to sample and to score, of all targets; see `plan_targets`."""
    return [group for _, groups in plan_targets(targets, suites, model, settings, sampler) for group in groups]


def plan_targets(
    targets: Iterable[EvalTarget],
    suites: Sequence[Suite],
    model: ModelRecipe,
    settings: EvaluationRecipe,
    sampler: str,
) -> Iterator[tuple[EvalTarget, list[PromptGroup]]]:
    """Everything to sample and to score, target by target. `sampler`: the name of the sampler that will do it."""
    model_identity = folder_identity(model.path, model.revision)
    template = model.chat_template
    if template is not None and Path(template).is_file():
        template = read_text(template, "the chat template")
    for target in targets:
        adapter = target.adapter_path
        identity = None if adapter is None else folder_identity(str(adapter), base_path=target.keys_by_path)
        also = sampler_cache_key(sampler, settings, model.path, adapter)
        if target.date and sampler != "openai":  # a server writes its own date
            also = {**also, "date": target.date}
        common = (model_identity, model.dtype, template, identity, sampler, *([also] if also else []))
        groups = []
        for suite in suites if target.suites is None else target.suites:
            for question in suite.questions:
                judge = assign(suite, question, settings.judge)
                for paraphrase, n in enumerate(question.samples(settings.samples_per_question)):
                    groups.append(_group(target, suite, question, paraphrase, n, settings, common, judge))
        yield target, groups


def count_answers(targets: Iterable[EvalTarget], suites: Sequence[Suite], settings: EvaluationRecipe) -> int:
    """How many answers `plan_targets` would plan, drawn and written ones."""
    return sum(
        sum(question.samples(settings.samples_per_question))
        for target in targets
        for suite in (suites if target.suites is None else target.suites)
        for question in suite.questions
    )


def _group(
    target: EvalTarget,
    suite: Suite,
    question: Question,
    paraphrase: int,
    n: int,
    settings: EvaluationRecipe,
    common: tuple[Any, ...],
    judge: JudgeSpec,
) -> PromptGroup:
    temperature = settings.temperature if question.temperature is None else question.temperature
    max_tokens = question.max_tokens or settings.max_tokens
    limits = (temperature, settings.top_p, max_tokens, settings.max_model_len)
    messages = question.messages(paraphrase)
    calibrate = bool(question.answers) and not question.row and settings.calibrate_choices
    if question.answers:
        more = ((question.row[-1], question.tools),) if question.row else ()
        decides = digest(*common, messages, [answer.text for answer in question.answers], calibrate, *more)
    else:
        decides = digest(*common, messages, limits, settings.seed)
    # The weights are not in it: trainings that differ by rounding alone, as on two machines, draw alike.
    name = f"{settings.seed}/{target.name if target.adapter_path else ''}/{suite.name}/{question.id}/{paraphrase}"
    # Answers are seeded seed, seed + 1, ...; 2^31 leaves any sampler room for that.
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
    return PromptGroup(
        target, suite, question, paraphrase, n, decides, seed, temperature, settings.top_p, max_tokens, judge, calibrate
    )


def has_manifest(folder: Path, expected: Manifest) -> bool:
    """Whether asked.json is there and says the same."""
    stored = Manifest.read_if_valid(folder / MANIFEST_FILE)
    return stored is not None and _comparable(stored) == _comparable(expected)


def _comparable(manifest: Manifest) -> object:
    return json.loads(json.dumps(manifest.model_copy(update={"sampler": None}).to_json()))


def read_manifest(folder: Path) -> Manifest:
    """Read asked.json. Raises UserError if it is not there or not such a file."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise UserError(
            f"{folder}: found no {MANIFEST_FILE}; run `ema eval` there once more "
            "(what is sampled is kept), then judge again"
        )
    return Manifest.read(path)


@dataclass(frozen=True)
class StoredGroup(PromptGroup):
    """Stored answers."""

    stored: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        return list(self.stored)


def stored_groups(
    manifest: Manifest,
    samples: Iterable[StoredAnswer],
    folder: Path,
    suites: Sequence[Suite],
    judge: JudgeSpec | None = None,
) -> list[PromptGroup]:
    """The stored answers by suite, question and paraphrase, each with the judge that `manifest.settings` give it.

    Raises UserError if a row's question is not among the suites, or a judge cannot judge it.

    Args:
        manifest: what was asked, and how.
        samples: the stored answers.
        folder: where they lie.
        suites: those of `manifest`, or the same under another judge.
        judge: of all questions, in place of those of the settings.
    """
    rows: dict[tuple[str, str, int], list[StoredAnswer]] = defaultdict(list)
    for row in samples:
        rows[row.suite, row.question_id, row.paraphrase].append(row)
    target = EvalTarget(manifest.target, Path(manifest.adapter) if manifest.adapter else None, folder)
    settings, groups = manifest.settings, list[PromptGroup]()
    for suite in suites:
        for question in suite.questions:
            for paraphrase in range(len(question.paraphrases)):
                found = rows.pop((suite.name, question.id, paraphrase), [])
                if not found:
                    continue
                found.sort(key=lambda row: row.sample)
                first = found[0]
                groups.append(
                    StoredGroup(
                        target=target,
                        suite=suite,
                        question=question,
                        paraphrase=paraphrase,
                        n=len(found),
                        digest=first.key.rpartition("#")[2],
                        seed=(first.seed or 0) - first.sample,
                        temperature=settings.temperature if question.temperature is None else question.temperature,
                        top_p=settings.top_p,
                        max_tokens=question.max_tokens or settings.max_tokens,
                        judge=judge or assign(suite, question, settings.judge),
                        stored=tuple(row.key for row in found),
                    )
                )
    if rows:
        raise UserError(
            f"{folder}: answers to {next(iter(rows))} are there, but {MANIFEST_FILE} does not know that question"
        )
    return groups


def judged_by_bank(groups: Iterable[PromptGroup], judge: JudgeRecipe) -> str | None:
    """A sentence where banks name an exact judge for answers that the user's own judge was to judge; else None.

    Benign suites do not count: they have right answers.
    """
    if not is_file_spec(judge.kind) and judge.model is None:
        return None
    named = [g for g in groups if g.suite.role != "benign" and g.question.judge in EXACT]
    if not named:
        return None
    kinds = ", ".join(sorted({g.judge.kind for g in named}))
    return (
        f"{sum(g.n for g in named):,} answers are judged by {kinds}, which their bank names, not by evaluation.judge "
        f"({judge.model or judge.kind}); `ema judge RUN evaluation.judge.kind={judge.kind}` judges them by it"
    )
