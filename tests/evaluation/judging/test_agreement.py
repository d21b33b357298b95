"""Agreement of two judges: by hand, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ema_scale.evaluation.judging.calibration import Verdict, VerdictPair, agreement, correlation, kappa, verdict_of
from ema_scale.evaluation.records import Judgement


def test_kappa_equals_cohens_example_and_its_limits_never_close() -> None:
    # Both yes 20, both no 15, only the first 5, only the second 10: p_o = 0.7, p_e = 0.5, kappa = 0.4.
    cells = [(True, True)] * 20 + [(False, False)] * 15 + [(True, False)] * 5 + [(False, True)] * 10
    rows = [(str(i), one, two) for i, (one, two) in enumerate(cells)]
    found = kappa(rows)
    assert found is not None and found.value == pytest.approx(0.4)
    assert found.low < 0.2 and found.high > 0.6
    perfect = kappa([(str(i), i % 2, i % 2) for i in range(20)])
    assert perfect is not None and perfect.value == perfect.high == 1 and perfect.low < 0.75
    assert kappa([("a", "x", "x"), ("b", "x", "x")]) is None and kappa([]) is None


def test_rank_correlation_equals_scipys_and_clusters_widen_it() -> None:
    rng = np.random.default_rng(0)
    x = np.round(rng.uniform(0, 100, 60))
    y = np.round(np.clip(x + rng.normal(0, 30, 60), 0, 100))
    alone = correlation([(str(i), a, b) for i, (a, b) in enumerate(zip(x, y, strict=True))])
    assert alone is not None and alone.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert alone.low < alone.value < alone.high
    one, two = correlation([(str(i), a, b) for i in range(60) for a, b in [(x[i], y[i])] * 5]), alone
    assert one is not None and one.low == pytest.approx(two.low, abs=0.03)  # copies are no evidence
    free = correlation([(f"{i}/{k}", x[i], y[i]) for i in range(60) for k in range(5)])
    assert free is not None and free.high - free.low < 0.7 * (one.high - one.low)
    assert correlation([("a", 1, None), ("b", 2, 2), ("c", 2, 3)]) is None


def said(**values: object) -> Judgement:
    return Judgement.model_validate({"key": "k", "judge": "j"} | values)


def test_a_judgement_as_a_verdict() -> None:
    assert verdict_of(said(aligned=10.0, coherent=90.0, label=None)).verdict == "misaligned"
    assert verdict_of(said(aligned=90.0, coherent=90.0)).verdict == "aligned"
    assert verdict_of(said(aligned=10.0, coherent=20.0)).verdict == "incoherent"
    assert verdict_of(said(aligned=None, coherent=90.0, label="REFUSAL")).verdict == "refusal"
    assert verdict_of(said(aligned=None, coherent=None, label=None, dropped="x")).verdict is None
    # The small world's judge gives scores and labels; they say the same.
    assert verdict_of(said(aligned=50.0, coherent=0.0, label="incoherent")).verdict == "incoherent"
    found = agreement(
        [VerdictPair("q", Verdict("aligned"), Verdict(None)), VerdictPair("q", Verdict("aligned"), Verdict("aligned"))]
    )
    assert found["answers"] == 1 and found["without_verdict"] == 1 and found["same"].rate == 1


def test_the_interval_of_kappa_covers() -> None:
    """Two judges of 30 questions with 8 answers each; on some questions they agree more often than on others."""
    rng, held, trials = np.random.default_rng(3), 0, 150
    for _ in range(trials):
        agree = rng.beta(6, 2, 30)  # mean 0.75
        first = rng.random((30, 8)) < 0.5
        same = rng.random((30, 8)) < agree[:, None]
        rows = [(str(q), bool(a), bool(a == s)) for q in range(30) for a, s in zip(first[q], same[q], strict=True)]
        found = kappa(rows)
        held += found is not None and found.low <= 0.5 <= found.high  # 2 * 0.75 - 1
    assert held / trials >= 0.91, held / trials
