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

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter
from scipy.special import stdtrit

from ema_scale.core.text import points
from ema_scale.report.aggregate import RunGroup
from ema_scale.report.curves import label_ends
from ema_scale.report.display_names import BASE, NO_DEFENSE
from ema_scale.report.style import MUTED, PAPER, family_colours, markers, panels
from ema_scale.report.table import Cell, Table, TableRow

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
class ScalingFit:
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


def fit_scaling(values: Mapping[int, float]) -> ScalingFit | None:
    """The line through parameters -> value; None for fewer than three sizes."""
    if len(values) < LEAST_SIZES:
        return None
    from scipy.stats import linregress  # takes most of a second to import

    x, y = [math.log10(n) for n in values], list(values.values())
    line = linregress(x, y)
    # Equal values leave scipy's error undefined; it is 0.
    margin = float(stdtrit(len(x) - 2, 0.975)) * (0.0 if math.isnan(line.stderr) else line.stderr)
    return ScalingFit(line.slope, line.slope - margin, line.slope + margin, fmean(y), fmean(x), len(x))


@dataclass(frozen=True)
class ScalingStudy:
    """sizes: model -> parameters of the base, smallest first; groups: label -> parameters -> that model's group."""

    sizes: Mapping[str, int]
    groups: Mapping[str, Mapping[int, RunGroup]]

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


def scaling(groups: Sequence[RunGroup]) -> ScalingStudy | None:
    """What the groups of all models say about size; None if fewer than three sizes were trained.

    Models without a parameter count (runs of older versions) are left out; of two models of one size, so is the second.
    """
    sizes: dict[str, int] = {}
    for g in groups:
        for run in g.runs:
            count = run.provenance.parameters.get("base", 0)
            if count > 0 and (g.model in sizes or count not in sizes.values()):
                sizes[g.model] = count
    if len(sizes) < LEAST_SIZES:
        return None
    ordered = dict(sorted(sizes.items(), key=lambda item: item[1]))
    by_label: dict[str, dict[int, RunGroup]] = {}
    for model, count in ordered.items():
        for g in groups:
            if g.model == model:
                by_label.setdefault(g.label, {})[count] = g
    return ScalingStudy(ordered, {label: of for label, of in by_label.items() if len(of) >= LEAST_SIZES})


def size_text(parameters: float) -> str:
    """`0.14M`, `7.6B`"""
    for unit, value in (("B", 1e9), ("M", 1e6)):
        if parameters >= value or unit == "M":
            return f"{parameters / value:.2g}{unit}" if parameters < 10 * value else f"{parameters / value:.0f}{unit}"
    raise AssertionError


def sentences(found: ScalingStudy) -> list[str]:
    """Does misalignment grow with size, do the prices shrink? In words, computed."""
    first, *_, last = (size_text(n) for n in found.sizes.values())
    said = []
    grows = fit_scaling(found.rates(NO_DEFENSE, "general_misaligned")) if NO_DEFENSE in found.groups else None
    if grows is not None:
        how = "it grows" if grows.low > 0 else "it shrinks" if grows.high < 0 else "no clear trend"
        said.append(
            f"From {first} to {last} parameters ({grows.n} models), misalignment outside the domain without a defense "
            f"changes by {points(grows.slope)} points [{points(grows.low)}, {points(grows.high)}] with ten times the "
            f"parameters: {how}."
        )
    for metric, name in PRICES.items():
        fits = {label: fit_scaling(found.price(label, metric)) for label in found.defenses}
        known = {label: f for label, f in fits.items() if f is not None}
        if not known:
            continue
        less = [label for label, f in known.items() if f.high < 0]
        more = [label for label, f in known.items() if f.low > 0]
        told = [f"{how} with size for {', '.join(ls)}" for how, ls in (("shrinks", less), ("grows", more)) if ls]
        said.append(f"The price on {name} {' and '.join(told) or 'shows no clear trend with size for any defense'}.")
    return said


def scaling_table(found: ScalingStudy) -> Table:
    """A line for the base, for no defense and for each defense."""
    lines = []
    for label in found.groups:
        kind = "base" if label == BASE else "none" if label == NO_DEFENSE else "defense"
        cells = [_cell(found.rates(label, "general_misaligned"), _percent)]
        cells += [_cell(found.price(label, m), points) if kind == "defense" else None for m in PRICES]
        lines.append(TableRow(label, kind, cells))
    names = ["Misaligned outside", *(f"Price on {name}" for name in PRICES.values())]
    return Table("Trends with size", _NOTE, names, lines, _AFTER)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _cell(values: Mapping[int, float], show: Callable[[float], str]) -> Cell | None:
    found = fit_scaling(values)
    if found is None:
        return None
    ends = list(values.values())
    below = f"{show(ends[0])} → {show(ends[-1])}"
    return Cell(points(found.slope), f"[{points(found.low)}, {points(found.high)}]", below)


_PANELS = (
    ("general_misaligned", "Misaligned outside the domain"),
    ("in_domain_misaligned", "Narrow task learned"),
    ("benign_learned", "Benign tasks learned"),
)
ALT = "Marks and lines: misaligned outside the domain, narrow and benign tasks learned, against model size, by defense."
CAPTION = (
    "Means of each model over its runs, in percent, with 95 % intervals, against the parameters of the model; thin "
    "lines are the fits of the table."
)


def scaling_figure(found: ScalingStudy, stacked: bool = False) -> Figure:
    """Three panels over parameters, which share their y axis."""
    figure, axes = panels(3, 11.4, 4.6, stacked=stacked, sharey=True)
    families = [next(iter(of.values())).family for of in found.groups.values()]
    colours, marks = family_colours(families), markers(families)
    for axis, (metric, title) in zip(axes, _PANELS, strict=True):
        ends = []
        drawn: set[tuple[str, ...]] = set()
        for number, (label, of) in enumerate(found.groups.items()):
            rates = {n: rate for n, g in of.items() if (rate := g.metrics.get(metric))}
            if not rates:
                continue
            family = next(iter(of.values())).family
            colour = MUTED if label == BASE else colours[family]
            # Defenses of one family have one colour; all but the first are hollow, with broken lines.
            again = label != BASE and family in drawn
            drawn |= {family} if label != BASE else set()
            edge, fill, stroke = (colour, PAPER, "--") if again else (PAPER, colour, "-")
            # A little apart, so that whiskers do not hide each other.
            x = [n * 1.03 ** (number - len(found.groups) / 2) for n in rates]
            whiskers = [[r.rate - r.low for r in rates.values()], [r.high - r.rate for r in rates.values()]]
            axis.errorbar(
                x, [r.rate for r in rates.values()], whiskers, fmt=marks[family], ms=6, color=colour,
                mec=edge, mfc=fill, mew=1, elinewidth=1.1, zorder=3,
            )  # fmt: skip
            line = fit_scaling({n: r.rate for n, r in rates.items()})
            last = list(rates)[-1]
            if line is not None:
                ns = sorted(rates)
                fitted = [min(1.0, max(0.0, line.at(n))) for n in ns]
                axis.plot(ns, fitted, ls=stroke, color=colour, lw=1.2, alpha=0.6, zorder=2)
            ends.append((label, 1.06 * x[-1], rates[last].rate))
        _size_axis(axis, list(found.sizes.values()))
        axis.set(title=title, xlabel="parameters")
        label_ends(figure, axis, ends)
    return figure


def _size_axis(axis: Axes, sizes: list[int]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    shown: list[int] = []
    for size in sizes:
        # Names of near sizes would run into each other.
        if not shown or size > shown[-1] * (sizes[-1] / sizes[0]) ** 0.13:
            shown.append(size)
    axis.set_xticks(shown, [size_text(n) for n in shown])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axis.grid(True, axis="y")
    axis.tick_params(length=0, which="both")
