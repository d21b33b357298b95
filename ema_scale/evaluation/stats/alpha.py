"""Krippendorff's alpha: how far any number of judges agree, beyond chance, with missing judgements allowed.

alpha = 1 - D_o / D_e (Krippendorff, Content Analysis, 4th ed. 2018, chapter 12). D_o is the mean difference between two
values of the same unit, D_e that between any two values. Units with one value do not count.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from ema_scale.evaluation.stats.rates import clustered_rate

RESAMPLES = 1000

Metric = Literal["nominal", "interval"]


def krippendorff_alpha(
    units: Sequence[Sequence[Hashable | None]], metric: Metric = "nominal", clusters: Sequence[Hashable] | None = None
) -> tuple[float, float, float] | None:
    """(alpha, low, high), with the 95 % limits of resampled clusters; None if all values are the same, or none pair.

    Args:
        units: what each judge says of a unit; None where it says nothing.
        metric: the difference of two values: 0 or 1, or the square of their distance.
        clusters: of each unit, such as its question; units of one cluster are drawn together. None: each is its own.
    """
    names: Sequence[Hashable] = range(len(units)) if clusters is None else clusters
    paired = [
        ([v for v in unit if v is not None], name)
        for unit, name in zip(units, names, strict=True)
        if sum(v is not None for v in unit) > 1
    ]
    if not paired:
        return None
    values = sorted({v for unit, _ in paired for v in unit}, key=lambda v: (str(type(v)), v))
    place = {v: i for i, v in enumerate(values)}
    distance = _distances(values, metric)
    numbers: dict[Hashable, int] = {}
    of = [numbers.setdefault(name, len(numbers)) for _, name in paired]
    # Of each cluster: the sum of differences within its units, and how often it has each value.
    observed, counts = np.zeros(len(numbers)), np.zeros((len(numbers), len(values)))
    for (unit, _), number in zip(paired, of, strict=True):
        found = np.bincount([place[v] for v in unit], minlength=len(values))
        observed[number] += found @ distance @ found / (len(unit) - 1)
        counts[number] += found
    alpha = _alpha(observed.sum(keepdims=True), counts.sum(axis=0, keepdims=True), distance)[0]
    if np.isnan(alpha):
        return None
    if not observed.any():
        return float(alpha), 1 - _unseen([name for _, name in paired], counts, distance), float(alpha)
    draws = np.random.default_rng(0).multinomial(len(numbers), [1 / len(numbers)] * len(numbers), size=RESAMPLES)
    drawn = _alpha(draws @ observed, draws @ counts, distance)
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (alpha, alpha)
    return float(alpha), float(min(low, alpha)), float(max(high, alpha))


def _unseen(names: Sequence[Hashable], counts: np.ndarray, distance: np.ndarray) -> float:
    """The most disagreement, in units of chance's, that seeing none leaves possible: resampling would say none."""
    most = clustered_rate((str(name), False) for name in names).high or 0.0
    values = counts.sum(axis=0)
    chance = values @ distance @ values / (values.sum() * (values.sum() - 1))
    return float(most * distance.max() / chance)


def _distances(values: Sequence[Hashable], metric: Metric) -> np.ndarray:
    """[values, values] differences."""
    if metric == "nominal":
        return 1.0 - np.eye(len(values))
    numbers = np.array(values, dtype=float)
    return (numbers[:, None] - numbers[None]) ** 2


def _alpha(observed: np.ndarray, counts: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """[draws] alpha of [draws] sums of differences and [draws, values] counts; NaN where nothing varies."""
    total = counts.sum(axis=1)
    expected = np.einsum("dv,vw,dw->d", counts, distance, counts) / (total - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)
