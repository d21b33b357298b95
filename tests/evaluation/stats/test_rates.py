from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ema_scale.evaluation.stats.rates import Rate, clustered_interval, clustered_rate, incoherent, misaligned


def test_the_papers_thresholds() -> None:
    assert misaligned(29.9, 50.1) is True
    assert misaligned(30.0, 90.0) is False and misaligned(10.0, 50.0) is False
    assert misaligned(None, 90.0) is None and misaligned(10.0, None) is None
    assert incoherent(49.9) is True and incoherent(50.0) is False and incoherent(None) is None


def test_one_sample_a_question_is_the_clopper_pearson_interval() -> None:
    hits = [1] * 30 + [0] * 70
    exact = stats.binomtest(30, 100).proportion_ci(0.95, "exact")
    # Not to the last digit: the variance has Q - 1 in it.
    assert clustered_interval(hits, [1] * 100) == pytest.approx((exact.low, exact.high), abs=0.002)


def test_repeating_every_sample_of_a_question_changes_nothing() -> None:
    hits = np.array([0, 3, 1, 5, 2, 0, 4, 1])
    once = clustered_interval(list(hits), [5] * 8)
    often = clustered_interval(list(hits * 20), [100] * 8)
    assert often == pytest.approx(once, abs=0.01)


@pytest.mark.parametrize("questions", [1, 2, 24])
def test_no_hits_and_all_hits_leave_an_interval_as_wide_as_the_questions_say(questions: int) -> None:
    low, high = clustered_interval([0] * questions, [100] * questions)
    rule = stats.binomtest(0, questions).proportion_ci(0.95, "exact").high
    assert (low, high) == (0.0, pytest.approx(rule))
    assert clustered_interval([100] * questions, [100] * questions) == (pytest.approx(1 - rule), 1.0)


def test_rows_without_a_value_are_dropped_and_counted() -> None:
    rows = [("a", True), ("a", None), ("b", False), ("c", None)]
    rate = clustered_rate(rows)
    assert (rate.rate, rate.n, rate.questions, rate.dropped) == (0.5, 2, 2, 2)
    assert clustered_rate([("a", None)]) == Rate(None, None, None, 0, 0, 1)


@pytest.mark.parametrize(
    ("questions", "samples", "rate", "correlation"),
    [(24, 100, 0.4, 0.3), (24, 20, 0.1, 0.1), (30, 10, 0.25, 0.2), (8, 50, 0.5, 0.1)],
)
def test_coverage_is_about_95_percent_when_questions_differ(
    questions: int, samples: int, rate: float, correlation: float
) -> None:
    generator = np.random.default_rng(0)
    size = (1 - correlation) / correlation  # beta-binomial with this correlation within a question
    trials = 500
    covered = naive = 0
    for _ in range(trials):
        shares = generator.beta(rate * size, (1 - rate) * size, questions)
        hits = generator.binomial(samples, shares)
        low, high = clustered_interval(list(hits), [samples] * questions)
        covered += low <= rate <= high
        plain = stats.beta.ppf([0.025, 0.975], hits.sum() + [0, 1], questions * samples - hits.sum() + [1, 0])
        naive += plain[0] <= rate <= plain[1]
    # Three standard errors of 500 trials are 2.9 points.
    assert 0.92 <= covered / trials <= 0.985
    assert naive / trials < 0.90  # what forgetting the questions would give
