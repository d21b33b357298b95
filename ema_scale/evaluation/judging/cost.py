"""What judging will take, before the first call, and what it took: calls, tokens, and money at the recipe's prices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ema_scale.evaluation.judges.assignment import SCORING
from ema_scale.evaluation.judges.budget import CHARACTERS_PER_TOKEN, Usage
from ema_scale.evaluation.judges.scores import MAX_TOKENS
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import Sample

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe


def estimate(missing: Iterable[tuple[PromptGroup, str]], samples: Mapping[str, Sample]) -> dict[str, Usage]:
    """What the 0-100 judges of these answers will take, by identity, from characters.

    An answer that is not sampled yet counts with the most tokens that it may have, and a reply with those of a judge
    that says its number at once.

    Args:
        missing: (group, key) of each answer to judge.
        samples: the answers that are there, by key.
    """
    found: dict[str, Usage] = {}
    for group, key in missing:
        judge = group.judge
        if judge.kind not in SCORING:
            continue
        usage = found.setdefault(judge.identity, Usage(guessed=True))
        sample = samples.get(key)
        answer = len(sample.answer) / CHARACTERS_PER_TOKEN if sample else group.max_tokens
        asked = len(group.question.paraphrases[group.paraphrase]) / CHARACTERS_PER_TOKEN + answer
        for prompt in judge.prompts.values():
            usage.calls += 1
            usage.input_tokens += round(len(prompt) / CHARACTERS_PER_TOKEN + asked)
            usage.output_tokens += MAX_TOKENS
    return found


def describe(usage: Usage, settings: JudgeRecipe) -> str:
    """`1,200 calls, about 480,000 tokens read and 6,000 written, about 0.08 at the recipe's prices`"""
    about = "about " if usage.guessed else ""
    text = f"{usage.calls:,} calls, {about}{usage.input_tokens:,} tokens read and {usage.output_tokens:,} written"
    price = usage.price(settings.price_input, settings.price_output)
    return text if price is None else f"{text}, {about}{price:,.2f} at the recipe's prices"
