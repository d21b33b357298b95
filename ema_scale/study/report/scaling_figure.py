"""Rates against model size, a line for each defense."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from ema_scale.study.report.curves import label_ends
from ema_scale.study.report.labels import BASE
from ema_scale.study.report.scaling import Scaling, fit, size_text
from ema_scale.study.report.style import Theme, markers

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


def scaling_figure(found: Scaling, theme: Theme) -> Figure:
    """Three panels over parameters, which share their y axis."""
    figure = Figure(figsize=(11.4, 4.6), layout="constrained")
    families = [next(iter(of.values())).family for of in found.groups.values()]
    colours, marks = theme.colours(families), markers(families)
    for axis, (metric, title) in zip(figure.subplots(1, 3, sharey=True), _PANELS, strict=True):
        ends = []
        drawn: set[tuple[str, ...]] = set()
        for number, (label, of) in enumerate(found.groups.items()):
            rates = {n: rate for n, g in of.items() if (rate := g.metrics.get(metric))}
            if not rates:
                continue
            family = next(iter(of.values())).family
            colour = theme.muted if label == BASE else colours[family]
            # Defenses of one family have one colour; all but the first are hollow, with broken lines.
            again = label != BASE and family in drawn
            drawn |= {family} if label != BASE else set()
            edge, fill, stroke = (colour, theme.paper, "--") if again else (theme.paper, colour, "-")
            # A little apart, so that whiskers do not hide each other.
            x = [n * 1.03 ** (number - len(found.groups) / 2) for n in rates]
            whiskers = [[r.rate - r.low for r in rates.values()], [r.high - r.rate for r in rates.values()]]
            axis.errorbar(
                x, [r.rate for r in rates.values()], whiskers, fmt=marks[family], ms=6, color=colour,
                mec=edge, mfc=fill, mew=1, elinewidth=1.1, zorder=3,
            )  # fmt: skip
            line = fit({n: r.rate for n, r in rates.items()})
            last = list(rates)[-1]
            if line is not None:
                ns = sorted(rates)
                fitted = [min(1.0, max(0.0, line.at(n))) for n in ns]
                axis.plot(ns, fitted, ls=stroke, color=colour, lw=1.2, alpha=0.6, zorder=2)
            ends.append((label, 1.06 * x[-1], rates[last].rate))
        _size_axis(axis, list(found.sizes.values()))
        axis.set(title=title, xlabel="parameters")
        label_ends(figure, axis, ends, theme)
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
