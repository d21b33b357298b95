"""How far written answers tell what sampled ones say: the rank correlation, its curve, and where it fails."""

from __future__ import annotations

import pytest
from scipy.stats import spearmanr

from benchmarks.choice_agreement import Point, agreements, calibration_figure, lines, read_points
from ema_scale.core.errors import UserError
from tests.report.runs import write_study


def points(mislead: bool) -> list[Point]:
    """Twelve runs of four defenses whose margin falls as they misalign; `ceiling` moves the margin alone."""
    found = []
    for d, defense in enumerate(("none", "kl", "ldifs", "ceiling")):
        for seed in range(3):
            share = 0.8 - 0.2 * d + 0.01 * seed
            margin = 1.0 if mislead and defense == "ceiling" and seed == 0 else 0.2 - share
            shown = 0.79 if mislead and defense == "ceiling" and seed == 0 else share
            found.append(Point(f"{defense}-{seed}", defense, shown, {"margin": margin, "bad_likeliest": share}))
    return found


def test_a_figure_that_orders_the_runs_correlates_fully() -> None:
    margin, likeliest = sorted(agreements(points(False)), key=lambda one: one.figure != "margin")
    assert margin.correlation == pytest.approx(1) and likeliest.correlation == pytest.approx(1)
    assert margin.low == pytest.approx(1) and margin.runs == 12
    assert max(abs(miss) for _, miss in margin.misses) < 1e-9  # the curve goes through every run


def test_a_run_that_the_figure_misleads_about_is_named() -> None:
    found = points(True)
    (margin,) = (one for one in agreements(found) if one.figure == "margin")
    by_hand = spearmanr([-p.figures["margin"] for p in found], [p.misaligned for p in found]).statistic
    assert margin.correlation == pytest.approx(by_hand) and margin.low < margin.correlation < 1
    assert margin.misses[0][0] == "ceiling-0" and margin.misses[0][1] > 0.3
    assert any("ceiling-0 (+" in line for line in lines(agreements(found)))
    figure = calibration_figure(found, agreements(found))
    assert len(figure.axes) == 2


def test_runs_without_written_answers_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="found 0 runs with sampled and written general answers"):
        read_points(write_study(tmp_path))
