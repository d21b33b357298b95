"""What judging and sampling will take, before the first call: calls and tokens, guessed from characters.

These are the only such formulas: `ema eval` says what they give before it starts, `ema plan` before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ema_scale.evaluation.judges.assignment import SCORING, JudgeSpec
from ema_scale.evaluation.judges.scores import MAX_TOKENS
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import Sample
from ema_scale.evaluation.suites import Question
from ema_scale.inference.usage import CHARACTERS_PER_TOKEN, Usage

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe

Asked = tuple[JudgeSpec, tuple[int, int]]
"""A judgement to be made: by whom, and the characters of question and answer."""


def estimate(asked: Iterable[Asked]) -> dict[str, Usage]:
    """What the 0-100 judges will take, by identity. Other judges take no call."""
    by_judge: dict[str, tuple[JudgeSpec, list[tuple[int, int]]]] = {}
    for judge, lengths in asked:
        if judge.kind in SCORING:
            by_judge.setdefault(judge.identity, (judge, []))[1].append(lengths)
    return {
        identity: judging(judge, len(lengths), sum(question + answer for question, answer in lengths))
        for identity, (judge, lengths) in by_judge.items()
    }


def place_of(identity: str, settings: JudgeRecipe) -> str:
    """Where a judge is asked, in words; its identity does not say it."""
    return f" at {settings.base_url}" if settings.base_url and identity.startswith("openai:") else ""


def asked_of(group: PromptGroup, sample: Sample | None) -> Asked:
    """The judgement of an answer. One that is not sampled yet (None) counts as the longest that it may be."""
    answer = len(sample.answer) if sample is not None else group.max_tokens * CHARACTERS_PER_TOKEN
    return group.judge, (len(group.question.paraphrases[group.paraphrase]), answer)


def estimate_sampling(missing: Sequence[PromptGroup]) -> Usage:
    """What a server will take to sample answers, each the longest that it may be.

    missing: the group of each answer.
    """
    read = sum(prompt_characters(g.question, g.paraphrase) for g in missing)
    return Usage(len(missing), read // CHARACTERS_PER_TOKEN, sum(g.max_tokens for g in missing), guessed=True)


def prompt_characters(question: Question, paraphrase: int) -> int:
    """Of everything that the model is asked, a system prompt and earlier turns included."""
    return sum(len(turn["content"]) for turn in question.messages(paraphrase))


def judging(judge: JudgeSpec, answers: int, characters: float) -> Usage:
    """What a 0-100 judge takes. Every reply counts as short: that of a judge that says its number at once.

    Args:
        judge: each of its prompts shows a question and an answer.
        answers: their number.
        characters: of all of these questions and answers together, each question as often as it has answers.
    """
    calls = answers * len(judge.prompts)
    read = answers * sum(map(len, judge.prompts.values())) + len(judge.prompts) * characters
    return Usage(calls, int(read / CHARACTERS_PER_TOKEN), calls * MAX_TOKENS, guessed=True)
