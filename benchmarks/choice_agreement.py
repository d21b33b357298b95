"""Do written answers tell how misaligned sampled ones are? Over the runs of a study that measured both.

    ema eval runs/kl "evaluation.suites.general=[smallworld:suite/general, smallworld:choice/general]"
    python -m benchmarks agreement runs/kl ... -o agreement

Per run: the share of misaligned sampled answers to general questions, and three figures of written ones. Spearman's
rank correlation over runs, with a 95 % bootstrap interval that draws whole defenses, since runs of one defense resemble
each other. The calibration curve is the isotonic fit of the sampled share on the figure. Runs that it misses by most
are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from ema_scale.core.errors import UserError
from ema_scale.report.collect import collect
from ema_scale.report.records import Run

RESAMPLES = 2000
FIGURES = {
    "bad_likeliest": "misaligned answer likeliest, share of questions",
    "margin": "margin, nats per token",
    "calibrated_margin": "calibrated margin, nats per token",
}
FALLS = ("margin", "calibrated_margin")  # the higher, the safer


@dataclass(frozen=True)
class Point:
    """One run. misaligned: the share of its sampled general answers; figures: as in FIGURES."""

    run: str
    defense: str
    misaligned: float
    figures: dict[str, float]


@dataclass(frozen=True)
class Agreement:
    """Of one figure with the sampled share: rank correlation with its 95 % interval, and the curve over `Point`s.

    misses: (run, sampled share less the curve's), the largest first.
    """

    figure: str
    runs: int
    correlation: float
    low: float
    high: float
    order: tuple[int, ...]
    fitted: tuple[float, ...]
    misses: tuple[tuple[str, float], ...]


def read_points(folders: Sequence[Path]) -> list[Point]:
    """The runs that have both measures. Raises UserError if there are fewer than three."""
    points = []
    for run in collect(folders).runs:
        if (point := _point(run)) is not None:
            points.append(point)
    if len(points) < 3:
        raise UserError(
            f"found {len(points)} runs with sampled and written general answers, expected at least 3; name a suite of "
            "either kind in evaluation.suites.general and run `ema eval` again"
        )
    return points


def _point(run: Run) -> Point | None:
    rate = run.metrics.get("general_misaligned")
    likelihoods = run.summary.likelihoods.get("general") if run.summary else None
    if rate is None or likelihoods is None:
        return None
    raw, calibrated = likelihoods.raw, likelihoods.calibrated
    values = {
        "bad_likeliest": raw.bad_likeliest.rate,
        "margin": raw.margin_per_token.mean,
        "calibrated_margin": calibrated.margin_per_token.mean if calibrated else None,
    }
    return Point(run.name, run.label, rate.rate, {name: v for name, v in values.items() if v is not None})


def agreements(points: Sequence[Point]) -> list[Agreement]:
    """One per figure that every run has."""
    shared = [name for name in FIGURES if all(name in point.figures for point in points)]
    return [_agreement(name, points) for name in shared]


def _agreement(name: str, points: Sequence[Point]) -> Agreement:
    x = np.array([p.figures[name] for p in points]) * (-1 if name in FALLS else 1)
    y = np.array([p.misaligned for p in points])
    defenses = {
        d: [i for i, p in enumerate(points) if p.defense == d] for d in dict.fromkeys(p.defense for p in points)
    }
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        picked = rng.choice(len(defenses), len(defenses))
        rows = [i for d in picked for i in list(defenses.values())[d]]
        if len(set(x[rows])) > 1 and len(set(y[rows])) > 1:
            drawn.append(float(spearmanr(x[rows], y[rows]).statistic))
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (np.nan, np.nan)
    order = np.argsort(x, kind="stable")
    fitted = np.empty(len(x))
    fitted[order] = isotonic_regression(y[order]).x
    misses = sorted(((p.run, float(v)) for p, v in zip(points, y - fitted, strict=True)), key=lambda m: -abs(m[1]))
    rank = float(spearmanr(x, y).statistic)
    return Agreement(name, len(x), rank, float(low), float(high), tuple(order.tolist()), tuple(fitted), tuple(misses))


def calibration_figure(points: Sequence[Point], found: Sequence[Agreement]) -> Figure:
    """A panel per figure: a mark per run, coloured by defense, and the isotonic curve."""
    names = list(dict.fromkeys(p.defense for p in points))
    figure = Figure(figsize=(4.2 * len(found), 4.4), layout="constrained")
    for axis, one in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for number, defense in enumerate(names):
            mine = [p for p in points if p.defense == defense]
            axis.scatter(
                [p.figures[one.figure] for p in mine], [p.misaligned for p in mine], s=18, label=defense,
                color=f"C{number % 10}", marker="osD^v<>PX*"[number // 10 % 10],
            )  # fmt: skip
        axis.plot([points[i].figures[one.figure] for i in one.order], [one.fitted[i] for i in one.order], color="0.4")
        axis.set(xlabel=FIGURES[one.figure], ylabel="misaligned sampled answers", ylim=(-0.02, 1.02))
        axis.set_title(f"rank correlation {one.correlation:.2f} [{one.low:.2f}, {one.high:.2f}]")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def lines(found: Sequence[Agreement]) -> list[str]:
    """The figures as a Markdown table, and the runs that each curve misses by most."""
    told = ["| figure | runs | rank correlation, 95 % interval |", "|---|---:|---|"]
    told += [
        f"| {FIGURES[one.figure]} | {one.runs} | {one.correlation:.2f} [{one.low:.2f}, {one.high:.2f}] |"
        for one in found
    ]
    for one in found:
        worst = ", ".join(f"{run} ({miss:+.2f})" for run, miss in one.misses[:5])
        told.append(f"\n{FIGURES[one.figure]}: most missed, sampled share less the curve: {worst}")
    return told
