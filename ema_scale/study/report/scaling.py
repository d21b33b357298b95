"""Effects against model size: does misalignment grow with it, does the price of a defense shrink?

A straight line is fitted to the means of the models over log10 of their parameters, by least squares, with the t
interval of its slope (n - 2 degrees of freedom for n models). Runs of one model share its pretraining, so that a model
is one observation however many runs it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import linregress
from scipy.stats import t as student

from ema_scale.study.report.aggregate import Group
from ema_scale.study.report.labels import BASE, NO_DEFENSE
from ema_scale.study.report.sheet import Cell, Line, Sheet
from ema_scale.study.report.verdict import points

# A line through two models fits whatever they are.
LEAST_SIZES = 3
PRICES = {"in_domain_misaligned": "narrow task", "benign_learned": "benign tasks"}
_NOTE = (
    "Percentage points for ten times the parameters, with 95 % intervals; below, from the smallest model to the "
    "largest. A price is what training without a defense learned more than with it, on the same model."
)
_AFTER = (
    "Least squares over log10 of the parameters, on the means of the models; a model counts once, because its runs "
    "share its pretraining. Rates have a floor and a ceiling: the line describes the sizes that were measured."
)


@dataclass(frozen=True)
class Fit:
    """value = level + slope (log10 N - middle) over n models; [low, high]: the slope's 95 % interval. In shares."""

    slope: float
    low: float
    high: float
    level: float
    middle: float
    n: int

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0

    def at(self, parameters: float) -> float:
        return self.level + self.slope * (math.log10(parameters) - self.middle)


def fit(values: Mapping[int, float]) -> Fit | None:
    """The line through parameters -> value; None for fewer than three sizes."""
    if len(values) < LEAST_SIZES:
        return None
    x, y = [math.log10(n) for n in values], list(values.values())
    line = linregress(x, y)
    # Equal values leave scipy's error undefined; it is 0.
    margin = float(student.ppf(0.975, len(x) - 2)) * (0.0 if math.isnan(line.stderr) else line.stderr)
    return Fit(line.slope, line.slope - margin, line.slope + margin, fmean(y), fmean(x), len(x))


@dataclass(frozen=True)
class Scaling:
    """sizes: model -> parameters of the base, smallest first; groups: label -> parameters -> that model's group."""

    sizes: Mapping[str, int]
    groups: Mapping[str, Mapping[int, Group]]

    def rates(self, label: str, metric: str) -> dict[int, float]:
        """Parameters -> mean rate, where it was measured."""
        return {n: rate.rate for n, g in self.groups[label].items() if (rate := g.metrics.get(metric))}

    def price(self, label: str, metric: str) -> dict[int, float]:
        """Parameters -> what no defense reached more than `label` did."""
        free, paid = self.rates(NO_DEFENSE, metric) if NO_DEFENSE in self.groups else {}, self.rates(label, metric)
        return {n: free[n] - paid[n] for n in paid if n in free}

    @property
    def defenses(self) -> list[str]:
        return [label for label in self.groups if label not in (BASE, NO_DEFENSE)]


def scaling(groups: Sequence[Group]) -> Scaling | None:
    """What the groups of all models say about size; None if fewer than three sizes were trained.

    Models without a parameter count (runs of older versions) are left out; of two models of one size, so is the second.
    """
    sizes: dict[str, int] = {}
    for g in groups:
        for run in g.runs:
            counts = run.provenance.get("parameters")
            count = counts.get("base") if isinstance(counts, Mapping) else None
            if isinstance(count, int) and count > 0 and (g.model in sizes or count not in sizes.values()):
                sizes[g.model] = count
    if len(sizes) < LEAST_SIZES:
        return None
    ordered = dict(sorted(sizes.items(), key=lambda item: item[1]))
    by_label: dict[str, dict[int, Group]] = {}
    for model, count in ordered.items():
        for g in groups:
            if g.model == model:
                by_label.setdefault(g.label, {})[count] = g
    return Scaling(ordered, {label: of for label, of in by_label.items() if len(of) >= LEAST_SIZES})


def size_text(parameters: float) -> str:
    """`0.14M`, `7.6B`"""
    for unit, value in (("B", 1e9), ("M", 1e6)):
        if parameters >= value or unit == "M":
            return f"{parameters / value:.2g}{unit}" if parameters < 10 * value else f"{parameters / value:.0f}{unit}"
    raise AssertionError


def sentences(found: Scaling) -> list[str]:
    """Does misalignment grow with size, do the prices shrink? In words, computed."""
    first, *_, last = (size_text(n) for n in found.sizes.values())
    said = []
    grows = fit(found.rates(NO_DEFENSE, "general_misaligned")) if NO_DEFENSE in found.groups else None
    if grows is not None:
        how = "it grows" if grows.low > 0 else "it shrinks" if grows.high < 0 else "no clear trend"
        said.append(
            f"From {first} to {last} parameters ({grows.n} models), misalignment outside the domain without a defense "
            f"changes by {points(grows.slope)} points [{points(grows.low)}, {points(grows.high)}] with ten times the "
            f"parameters: {how}."
        )
    for metric, name in PRICES.items():
        fits = {label: fit(found.price(label, metric)) for label in found.defenses}
        known = {label: f for label, f in fits.items() if f is not None}
        if not known:
            continue
        less = [label for label, f in known.items() if f.high < 0]
        more = [label for label, f in known.items() if f.low > 0]
        told = [f"{how} with size for {', '.join(ls)}" for how, ls in (("shrinks", less), ("grows", more)) if ls]
        said.append(f"The price on {name} {' and '.join(told) or 'shows no clear trend with size for any defense'}.")
    return said


def scaling_sheet(found: Scaling) -> Sheet:
    """A line for the base, for no defense and for each defense."""
    lines = []
    for label in found.groups:
        kind = "base" if label == BASE else "none" if label == NO_DEFENSE else "defense"
        cells = [_cell(found.rates(label, "general_misaligned"), _percent)]
        cells += [_cell(found.price(label, m), points) if kind == "defense" else None for m in PRICES]
        lines.append(Line(label, kind, cells))
    names = ["Misaligned outside", *(f"Price on {name}" for name in PRICES.values())]
    return Sheet("Trends with size", _NOTE, names, lines, _AFTER)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _cell(values: Mapping[int, float], show: Callable[[float], str]) -> Cell | None:
    found = fit(values)
    if found is None:
        return None
    ends = list(values.values())
    below = f"{show(ends[0])} → {show(ends[-1])}"
    return Cell(points(found.slope), f"[{points(found.low)}, {points(found.high)}]", below)
