"""The difference of two rates on the same questions: its 95 % interval, its p value, and whether it is small enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ema_scale.evaluation.stats.rates import clustered_interval, korn_graubard

RESAMPLES = 9999
# Signs that one batch of resamples may hold: 16 MB as floats.
BATCH = 2**21
METHOD = (
    "Differences are paired by question; the forms of one question (plain, JSON, template) count as one question. "
    "Their 95 % interval joins both arms' intervals by square-and-add with the correlation of the two over questions "
    "(Newcombe 1998; MOVER); that of margins and losses is Student's, over the questions' differences. p: two-sided "
    "test that flips the signs of the questions' differences. It asks whether the differences lie evenly around 0. "
    "Holm: p corrected for the number of arms compared with this one (Holm 1979)."
)


@dataclass(frozen=True)
class Difference:
    """first - second as a share, with its 95 % interval and p value.

    questions: independent ones, so that the forms of one question count once.
    holm: p corrected for the other comparisons with the same arm; None where there was no correction.
    """

    value: float
    low: float
    high: float
    p: float
    questions: int
    holm: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def corrected_p(self) -> float:
        """`holm`, or p where there was no correction."""
        return self.p if self.holm is None else self.holm


@dataclass(frozen=True)
class Counts:
    """Hits among answers, cluster by cluster: x, m are for one arm, y, k for the other, in one order."""

    x: np.ndarray
    m: np.ndarray
    y: np.ndarray
    k: np.ndarray


def paired_difference(counts: Counts, *, fractional: bool = False) -> Difference:
    """sum(x) / sum(m) - sum(y) / sum(k), with clusters of questions as the units.

    fractional: x and y are sums of shares, not counts. Interval: Newcombe, Statistics in Medicine 17 (1998)
    2635-2650, method 10, with the arms' clustered intervals and the correlation of their influence values over
    clusters (MOVER: Zou and Donner, 27 (2008) 1693-1702). p: `swap_p`.
    """
    x, m, y, k = counts.x, counts.m, counts.y, counts.k
    interval = korn_graubard if fractional else clustered_interval
    one, two = x.sum() / m.sum(), y.sum() / k.sum()
    (low_1, high_1), (low_2, high_2) = interval(list(x), list(m)), interval(list(y), list(k))
    u, v = x - one * m, y - two * k
    spread = math.sqrt(float((u**2).sum() * (v**2).sum()))
    correlation = min(1.0, max(-1.0, float((u * v).sum()) / spread)) if spread > 0 else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * correlation * a * b + b**2))

    value = float(one - two)
    low = max(-1.0, value - distance(one - low_1, high_2 - two))
    high = min(1.0, value + distance(high_1 - one, two - low_2))
    return Difference(value, low, high, swap_p(counts), len(x))


def swap_p(counts: Counts) -> float:
    """The two-sided p value when the arms are swapped within clusters; 1 if their rates agree in every cluster.

    A swap flips the sign of the cluster's difference of rates, weighted by its answers. So the arms may differ in how
    many answers they gave. Exact up to 13 clusters that differ, else from 9,999 swaps drawn with a fixed seed.
    """
    signed = (counts.m + counts.k) * (counts.x / counts.m - counts.y / counts.k)
    signed = signed[signed != 0]
    if not len(signed):
        return 1.0
    total = float(signed.sum())
    exact = 2 ** len(signed) <= RESAMPLES
    draws = 2 ** len(signed) if exact else RESAMPLES
    as_far, step, rng = 0, max(1, BATCH // len(signed)), np.random.default_rng(0)
    for start in range(0, draws, step):
        count = min(step, draws - start)
        flips: np.ndarray
        if exact:
            flips = (np.arange(start, start + count)[:, None] >> np.arange(len(signed))) & 1
        else:
            flips = np.unpackbits(rng.integers(0, 256, (count, -(-len(signed) // 8)), dtype=np.uint8), axis=1)
            flips = flips[:, : len(signed)]
        sums = total - 2 * (flips.astype(float) @ signed)
        # Sums in another order differ in their last digits.
        as_far += int((abs(sums) >= abs(total) - 1e-9 * abs(signed).sum()).sum())
    return as_far / draws if exact else (as_far + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number, so that the chance of any false finding stays at the level.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. Raises ValueError for a value outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p values: found {list(p_values)}, expected numbers from 0 to 1")
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def equivalent(low: float, high: float, margin: float) -> bool:
    """Whether a 95 % interval shows that a difference is smaller than `margin` either way.

    These are two one-sided tests (TOST) at 2.5 % each: Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15
    (1987) 657-680. No clear difference is no evidence of none; this is.
    """
    return -margin < low and high < margin
