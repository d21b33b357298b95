"""What a 95 % interval covers, by simulation: fixed seeds, truths that the interval's model holds and others."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from ema_scale.evaluation.stats.rates import clustered_interval, korn_graubard

TRIALS = 250


def beta(rng: np.random.Generator, mean: float, correlation: float, questions: int) -> np.ndarray:
    size = 1 / correlation - 1
    return rng.beta(mean * size, (1 - mean) * size, (TRIALS, questions))


def covered(shares: np.ndarray, samples: int, truth: float, rng: np.random.Generator, interval: object) -> float:
    """How often the interval of `samples` answers to each question holds the mean over all questions."""
    hits = rng.binomial(samples, shares)
    limits = [interval(list(row), [samples] * len(row)) for row in hits]  # type: ignore[operator]
    return float(np.mean([low <= truth <= high for low, high in limits]))


@pytest.mark.parametrize(
    ("mean", "correlation", "questions", "samples"),
    [(0.01, 0.3, 24, 100), (0.02, 0.6, 24, 100), (0.005, 0.3, 48, 100), (0.05, 0.3, 24, 10), (0.3, 0.3, 48, 10),
     (0.99, 0.3, 24, 100)],
)  # fmt: skip
def test_rates_rare_and_clustered_are_covered_too(
    mean: float, correlation: float, questions: int, samples: int
) -> None:
    rng = np.random.default_rng(7)
    found = covered(beta(rng, mean, correlation, questions), samples, mean, rng, clustered_interval)
    # 250 trials at 95 % lie above 91.9 % with 99 % probability.
    assert found >= 0.92, found


def test_korn_graubard_alone_does_not_cover_them() -> None:
    rng = np.random.default_rng(7)
    assert covered(beta(rng, 0.01, 0.3, 24), 100, 0.01, rng, korn_graubard) < 0.87


def test_where_a_tenth_of_the_questions_always_go_wrong_and_where_the_logits_are_normal() -> None:
    rng = np.random.default_rng(7)
    some = (rng.random((TRIALS, 48)) < 0.1) * 0.9
    assert covered(some, 100, 0.09, rng, clustered_interval) >= 0.92
    normal = special.expit(rng.normal(-4, 2, (TRIALS, 48)))
    truth = float(special.expit(rng.normal(-4, 2, 1_000_000)).mean())
    assert covered(normal, 10, truth, rng, clustered_interval) >= 0.92
