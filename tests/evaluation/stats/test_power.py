"""Spread and planning, by simulation against known variances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ema_scale.evaluation.stats.power import Spread, describe_power, paired_spread, spread


def test_the_measured_spread_is_the_true_one() -> None:
    rng = np.random.default_rng(0)
    shares = rng.beta(1, 4, 20_000)  # variance 0.2 * 0.8 / 6, within 0.16 less that
    hits = rng.binomial(5, shares)
    found = spread(list(hits), [5] * len(hits))
    assert found is not None
    assert found.between == pytest.approx(0.16 / 6, rel=0.05) and found.within == pytest.approx(0.8 / 6, rel=0.03)
    other = rng.binomial(5, shares)  # the same questions, the same truth: their difference has no true spread
    paired = paired_spread(list(hits), [5] * len(hits), list(other), [5] * len(hits))
    assert paired is not None and paired.between < 0.002 and paired.within == pytest.approx(2 * 0.8 / 6, rel=0.03)


def test_a_study_planned_by_it_has_the_width_that_was_asked_for() -> None:
    rng = np.random.default_rng(1)
    truth = Spread(0.16 / 6, 0.8 / 6)
    questions = truth.questions_for(0.03, samples=10)
    assert questions is not None
    assert truth.half_width(questions, 10) <= 0.03 < truth.half_width(questions - 1, 10)
    means = rng.binomial(10, rng.beta(1, 4, (4000, questions))).mean(1) / 10
    assert 1.96 * means.std() == pytest.approx(0.03, rel=0.06)


def test_more_samples_help_only_as_far_as_the_questions_agree() -> None:
    found = Spread(0.02, 0.1)
    assert found.samples_for(0.01, 24) is None and found.half_width(24, math.inf) > 0.05
    few = found.samples_for(0.065, 24)
    assert few is not None and found.half_width(24, few) <= 0.065 < found.half_width(24, few - 1)
    assert found.questions_for(1e-5, 10) is None
    assert "no number of answers to these questions (at best ±6.0)" in describe_power(found, 24, 10)
    assert "such questions, or" in describe_power(found, 24, 10) and "would take" not in describe_power(
        found, 24, 10, 0.5
    )


def test_nothing_can_be_said_from_one_answer_a_question() -> None:
    assert spread([1, 0, 1], [1, 1, 1]) is None and paired_spread([1], [2], [1], [2]) is None
