"""What an evaluation records of its judge's replies: what could not be read, what they took, how judges agree."""

from __future__ import annotations

from ema_scale.evaluation.record_types import Estimate, Record


class UnreadReplies(Record):
    """Answers of which a judge's reply could not be read. They count in no rate.

    answers: how many; of: answers that the judge replied to.
    examples: the first three replies.
    """

    answers: int
    of: int
    examples: list[str]


class JudgeUsage(Record):
    """What the judgements took. price: at the recipe's prices, None without them."""

    calls: int
    input_tokens: int
    output_tokens: int
    price: float | None = None


class JudgeAlpha(Record):
    """Krippendorff's alpha over all 0-100 judges of the same answers: 1 is agreement, 0 is chance.

    judges: their identities.
    answers: those that at least two of them judged.
    verdict, misaligned: of nominal values; aligned, coherent: of scores, by squared difference. None where undefined.
    """

    judges: list[str]
    answers: int
    questions: int
    verdict: Estimate | None
    misaligned: Estimate | None
    aligned: Estimate | None
    coherent: Estimate | None
