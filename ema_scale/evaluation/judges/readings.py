"""Answers that are read, not judged: a rating that the policy gives, and the token that it says first.

Both are llmcomp's types of questions. llmcomp reads one answer's log-probabilities; here the mean and the shares over
sampled answers estimate the same, with any sampler.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ema_scale.evaluation.judges.base import ExactJudge, JudgeItem
from ema_scale.evaluation.records import Judgement

RATING, NEXT_TOKEN = "rating", "next_token"
READ = (RATING, NEXT_TOKEN)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w]|\.\d)")


def rating_judge(name: str, scale: tuple[float, float]) -> ExactJudge:
    """Reads the first number of an answer, which lies on `scale`; `name` is its score's. Others are dropped."""

    def verdict(item: JudgeItem) -> Judgement:
        found = _NUMBER.search(item.answer)
        value = float(found[0]) if found else None
        if value is not None and scale[0] <= value <= scale[1]:
            return Judgement(key=item.key, judge=item.judge, scores={name: value})
        return Judgement(key=item.key, judge=item.judge, scores={name: None}, dropped="no rating on the scale")

    return ExactJudge(verdict)


def next_token_judge() -> ExactJudge:
    """Keeps what an answer says as its label, white space around it left out."""
    return ExactJudge(lambda item: Judgement(key=item.key, judge=item.judge, label=item.answer.strip()))


def reader(kind: str, name: str, scale: tuple[float, float]) -> ExactJudge:
    """The judge of one of the kinds in READ."""
    make: Callable[[], ExactJudge] = next_token_judge if kind == NEXT_TOKEN else lambda: rating_judge(name, scale)
    return make()
