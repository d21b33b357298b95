"""What judging will take, before the first call, and what it took: calls, tokens, and money at the recipe's prices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ema_scale.evaluation.judges.assignment import SCORING, JudgeSpec
from ema_scale.evaluation.judges.budget import CHARACTERS_PER_TOKEN, Usage
from ema_scale.evaluation.judges.scores import MAX_TOKENS
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import Sample

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe


def estimate(missing: Iterable[tuple[PromptGroup, Sample | None]]) -> dict[str, Usage]:
    """What the 0-100 judges of these answers will take, by identity.

    missing: the group of each answer to judge, and the answer; None if it is not sampled yet.
    """
    asked: dict[str, tuple[JudgeSpec, list[tuple[int, int]]]] = {}
    for group, sample in missing:
        if group.judge.kind in SCORING:
            asked.setdefault(group.judge.identity, (group.judge, []))[1].append(characters(group, sample))
    return {identity: usage_of(judge, lengths) for identity, (judge, lengths) in asked.items()}


def characters(group: PromptGroup, sample: Sample | None) -> tuple[int, int]:
    """Those of question and answer. An answer that is not sampled yet has the most tokens that it may have."""
    answer = len(sample.answer) if sample is not None else group.max_tokens * CHARACTERS_PER_TOKEN
    return len(group.question.paraphrases[group.paraphrase]), answer


def usage_of(judge: JudgeSpec, asked: Sequence[tuple[int, int]]) -> Usage:
    """What a judge will take, guessed from the characters of question and answer.

    Every reply counts as short: that of a judge that says its number at once.
    """
    calls = len(asked) * len(judge.prompts)
    read = sum(len(prompt) + question + answer for prompt in judge.prompts.values() for question, answer in asked)
    return Usage(calls, read // CHARACTERS_PER_TOKEN, calls * MAX_TOKENS, guessed=True)


def describe(usage: Usage, settings: JudgeRecipe) -> str:
    """`1,200 calls, about 480,000 tokens read and 6,000 written, about 0.08 at the recipe's prices`"""
    about = "about " if usage.guessed else ""
    text = f"{usage.calls:,} calls, {about}{usage.input_tokens:,} tokens read and {usage.output_tokens:,} written"
    price = usage.price(settings.price_input, settings.price_output)
    return text if price is None else f"{text}, {about}{price:,.2f} at the recipe's prices"
