"""How many questions and samples an interval of a given width takes, from the spread that was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from ema_scale.core.text import quantity

MOST = 100_000


@dataclass(frozen=True)
class Spread:
    """Two variances of a rate, or of the difference of two rates on the same questions, in squared shares.

    between: of the true shares over questions; within: of a single answer about its question's true share.
    """

    between: float
    within: float

    def half_width(self, questions: int, samples: float) -> float:
        """Half the 95 % interval of a mean over `questions`, `samples` answers each (infinity: the limit)."""
        t = float(special.stdtrit(questions - 1, 0.975))
        return t * math.sqrt((self.between + self.within / samples) / questions)

    def questions_for(self, half_width: float, samples: float) -> int | None:
        """The fewest questions, `samples` answers each, that give this half width; None: over 100,000."""
        low, high = 2, MOST
        if self.half_width(high, samples) > half_width:
            return None
        while low < high:
            middle = (low + high) // 2
            if self.half_width(middle, samples) <= half_width:
                high = middle
            else:
                low = middle + 1
        return low

    def samples_for(self, half_width: float, questions: int) -> int | None:
        """The fewest answers to each of `questions`; None if no number does, for the questions differ too much."""
        t = float(special.stdtrit(questions - 1, 0.975))
        room = half_width**2 * questions / t**2 - self.between
        if room <= 0 or self.within / room > MOST:
            return None
        return max(1, math.ceil(self.within / room))


def spread(hits: Sequence[float], counts: Sequence[float]) -> Spread | None:
    """The spread of one rate by the method of moments; None with fewer than two questions of two answers each.

    hits: misaligned (or right) answers of each question; counts: its answers.
    """
    x, m = _repeated(hits, counts)
    if len(x) < 2:
        return None
    share = x / m
    within = share * (1 - share) * m / (m - 1)
    return _spread(share, within / m, within)


def paired_spread(
    hits: Sequence[float], counts: Sequence[float], base_hits: Sequence[float], base_counts: Sequence[float]
) -> Spread | None:
    """The spread of the difference of two rates on the same questions, in the same order."""
    both = [i for i, (a, b) in enumerate(zip(counts, base_counts, strict=True)) if a > 1 and b > 1]
    if len(both) < 2:
        return None
    x, m, y, k = (np.asarray(v, dtype=float)[both] for v in (hits, counts, base_hits, base_counts))
    one, two = x / m * (1 - x / m) * m / (m - 1), y / k * (1 - y / k) * k / (k - 1)
    return _spread(x / m - y / k, one / m + two / k, one + two)


def _repeated(hits: Sequence[float], counts: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, m = np.asarray(hits, dtype=float), np.asarray(counts, dtype=float)
    return x[m > 1], m[m > 1]


def _spread(values: np.ndarray, noise: np.ndarray, within: np.ndarray) -> Spread:
    # The values vary over questions by their true spread and by the noise of few answers.
    return Spread(max(0.0, float(values.var(ddof=1) - noise.mean())), float(within.mean()))


def describe_power(found: Spread, questions: int, samples: float, half_width: float = 0.01) -> str:
    """What this spread means for whoever plans the next evaluation: `half_width` is a share, as 0.01 for 1 point."""
    goal = f"±{100 * half_width:g} point{'' if half_width == 0.01 else 's'}"
    width = 100 * found.half_width(questions, samples)
    now = f"{questions} questions with {samples:g} answers each give about ±{width:.1f} points"
    if found.half_width(questions, samples) <= half_width:
        return f"{now}."
    more = found.samples_for(half_width, questions)
    others = found.questions_for(half_width, samples)
    if more is not None:
        by_samples = f"{quantity(more, 'answer')} to each of them"
    else:
        limit = 100 * found.half_width(questions, math.inf)
        by_samples = f"no number of answers to these questions (at best ±{limit:.1f})"
    by_questions = f"{others:,} such questions" if others is not None else f"over {MOST:,} such questions"
    return f"{now}; {goal} would take {by_questions}, or {by_samples}."
