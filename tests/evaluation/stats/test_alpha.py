"""Krippendorff's alpha against its author's published example, and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from ema_scale.evaluation.stats.alpha import krippendorff_alpha

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section E: four observers, twelve units.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def test_the_published_example() -> None:
    units = list(zip(*OBSERVERS, strict=True))
    nominal, interval = krippendorff_alpha(units), krippendorff_alpha(units, "interval")
    assert nominal is not None and nominal[0] == pytest.approx(0.743, abs=5e-4)
    assert interval is not None and interval[0] == pytest.approx(0.849, abs=5e-4)
    assert nominal[1] < nominal[0] < nominal[2] and interval[1] < interval[0] < interval[2]


def test_agreement_chance_and_what_is_undefined() -> None:
    same = krippendorff_alpha([(str(i % 2),) * 3 for i in range(40)])
    assert same is not None and same[0] == same[2] == 1 and 0.5 < same[1] < 0.95  # seeing no difference is no proof
    rng = np.random.default_rng(5)
    chance = krippendorff_alpha(rng.integers(0, 2, (400, 3)).tolist())
    assert chance is not None and abs(chance[0]) < 0.08 and chance[1] < 0 < chance[2]
    assert krippendorff_alpha([("a", "a"), ("a", "a")]) is None
    assert krippendorff_alpha([("a", None), (None, "b")]) is None and krippendorff_alpha([]) is None
    opposite = krippendorff_alpha([(0, 1), (1, 0)] * 10)
    assert opposite is not None and opposite[0] < -0.9


def test_answers_to_one_question_are_drawn_together() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 60)
    other = np.where(rng.random(60) < 0.2, 1 - truth, truth)
    units = [(int(a), int(b)) for a, b in zip(truth, other, strict=True)]
    alone, copies = krippendorff_alpha(units), krippendorff_alpha(units * 5, clusters=list(range(60)) * 5)
    free = krippendorff_alpha(units * 5)
    assert alone and copies and free
    assert copies[2] - copies[1] == pytest.approx(alone[2] - alone[1], rel=0.15)  # copies are no evidence
    assert free[2] - free[1] < 0.6 * (alone[2] - alone[1])
