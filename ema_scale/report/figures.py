"""The figures: headline trade-off and bars. Each function draws one matplotlib Figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ema_scale.report.aggregate import RunGroup, base_of
from ema_scale.report.records import ReportedRate
from ema_scale.report.style import (
    INCOHERENT,
    INK,
    MISALIGNED,
    MUTED,
    NARROW_INCHES,
    PAPER,
    Box,
    family_colours,
    lay_out,
    markers,
    panels,
    place_labels,
)

_PANELS = (
    ("in_domain_misaligned", "Narrow task learned", "misaligned in the trained domain"),
    ("benign_learned", "Benign task learned", "right answers after training on it"),
)


def headline(groups: Sequence[RunGroup], stacked: bool = False) -> Figure | None:
    """Task learned (x) against misalignment outside the domain (y), a mark for each defense, in two panels.

    `groups`: those of one model. `stacked`: one panel above the other, for narrow screens. The lower right
    corner is where one wants to be. None if no answer outside the domain was judged.
    """
    if not any(g.metrics.get("general_misaligned") for g in groups):
        return None
    # More marks need more room for their names.
    height = min(8.0, 4.6 + 0.14 * len(groups))
    figure, axes = panels(2, 10.8, 0.85 * height if stacked else height, stacked=stacked, sharey=True)
    base = base_of(groups)
    drawn = [g for g in groups if not g.base]
    tops = [r.high for g in groups if (r := g.metrics.get("general_misaligned"))]
    top = min(1.0, max([0.05, *tops]) * 1.12 + 0.01)
    for axis, (_, title, what) in zip(axes, _PANELS, strict=True):
        _percent_axes(axis)
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.02 * top / 0.5, top), title=title, xlabel=what)
        axis.grid(True)
    for axis in axes if stacked else axes[:1]:
        axis.set_ylabel("misaligned outside the domain")
    axes[0].text(
        0.02,
        0.97,
        "better: lower right ↘",
        transform=axes[0].transAxes,
        va="top",
        color=MUTED,
        fontsize=9,
    )
    for axis, (metric, *_) in zip(axes, _PANELS, strict=True):
        _panel(figure, axis, drawn, base, metric)
    return figure


def _percent_axes(axis: Axes) -> None:
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    axis.tick_params(length=0)
    axis.set_axisbelow(True)


def _panel(figure: Figure, axis: Axes, groups: Sequence[RunGroup], base: RunGroup | None, metric: str) -> None:
    families = [g.family for g in groups]
    colours, shapes = family_colours(families), markers(families)
    shown = [(g, x, y) for g in groups if (x := g.metrics.get(metric)) and (y := g.metrics.get("general_misaligned"))]
    dashed = base.metrics.get("general_misaligned") if base else None
    if dashed:
        axis.axhline(dashed.rate, color=MUTED, lw=1, ls=(0, (5, 4)), zorder=1)
        axis.axhspan(dashed.low, dashed.high, color=MUTED, alpha=0.10, lw=0, zorder=0)
    if not shown:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=MUTED)
    lines = []
    for one in dict.fromkeys(g.sweep for g, _, _ in shown if g.sweep):
        # Strengths of one defense are joined: its trade-off curve.
        line = sorted((g.strength, x.rate, y.rate) for g, x, y in shown if g.sweep == one and g.strength is not None)
        colour = next(colours[g.family] for g, _, _ in shown if g.sweep == one)
        if len(line) > 1:
            axis.plot([p[1] for p in line], [p[2] for p in line], color=colour, lw=1.2, alpha=0.45, zorder=2)
            lines += [(a[1:], b[1:]) for a, b in zip(line, line[1:], strict=False)]
    for g, x, y in shown:
        axis.errorbar(
            x.rate, y.rate, xerr=_whiskers(x), yerr=_whiskers(y), fmt=shapes[g.family], ms=8, zorder=4,
            alpha=0.95, color=colours[g.family], mec=PAPER, mew=1.2, elinewidth=1.3,
        )  # fmt: skip
    _label(figure, axis, [(g.label, x, y) for g, x, y in shown], lines, dashed)


def _whiskers(rate: ReportedRate) -> list[list[float]]:
    return [[rate.rate - rate.low], [rate.high - rate.rate]]


def _label(
    figure: Figure,
    axis: Axes,
    marks: Sequence[tuple[str, ReportedRate, ReportedRate]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    dashed: ReportedRate | None,
) -> None:
    """Write each mark's name beside it, clear of marks, whiskers, joining lines and other names."""
    lay_out(figure)
    scale = 72 / figure.dpi

    def at(x: float, y: float) -> tuple[float, float]:
        px, py = axis.transData.transform((x, y))
        return float(px * scale), float(py * scale)

    names = [name for name, _, _ in marks]
    anchors = [at(x.rate, y.rate) for _, x, y in marks]
    obstacles = []
    for _, x, y in marks:
        (cx, cy), (left, _), (right, _) = at(x.rate, y.rate), at(x.low, y.rate), at(x.high, y.rate)
        (_, bottom), (_, top) = at(x.rate, y.low), at(x.rate, y.high)
        obstacles += [Box(cx - 5, cy - 5, cx + 5, cy + 5), Box(left, cy - 1.5, right, cy + 1.5)]
        obstacles += [Box(cx - 1.5, bottom, cx + 1.5, top)]
    for start, end in lines:
        for along in np.linspace(0, 1, 60):
            cx, cy = at(*(a + along * (b - a) for a, b in zip(start, end, strict=True)))
            obstacles.append(Box(cx - 2.5, cy - 2.5, cx + 2.5, cy + 2.5))
    if dashed:
        start, end = (at(x, dashed.rate) for x in axis.get_xlim())
        obstacles.append(Box(start[0], start[1] - 1, end[0], end[1] + 1))
        names.append("aligned base")
        anchors.append(_emptiest([at(x, dashed.rate) for x in np.linspace(*axis.get_xlim(), 21)[2:-2]], anchors))
    area = axis.get_window_extent()
    bounds = Box(*(float(v * scale) for v in (area.x0, area.y0, area.x1 + 8, area.y1)))
    texts = []
    for i, name in enumerate(names):
        is_base = i >= len(marks)
        texts.append(
            axis.text(0, 0, name, color=MUTED if is_base else INK, zorder=6, va="bottom",
                      fontsize=8.5 if is_base else 9.5, style="italic" if is_base else "normal")
        )  # fmt: skip
    sizes = []
    for text in texts:
        box = text.get_window_extent()
        sizes.append((float(box.width * scale), float(box.height * scale)))
    for text, anchor, spot in zip(texts, anchors, place_labels(anchors, sizes, obstacles, bounds), strict=True):
        x, y = axis.transData.inverted().transform((spot.box.left / scale, spot.box.bottom / scale))
        text.set_position((float(x), float(y)))
        if spot.leader and text.get_fontstyle() != "italic":
            near = (
                min(max(anchor[0], spot.box.left), spot.box.right),
                min(max(anchor[1], spot.box.bottom), spot.box.top),
            )
            ends = axis.transData.inverted().transform([(p[0] / scale, p[1] / scale) for p in (anchor, near)])
            axis.plot(ends[:, 0], ends[:, 1], color=MUTED, lw=0.6, zorder=3)


def _emptiest(points: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the points of a line, the one that is farthest from the marks along it; the last of those as far."""
    return max(points, key=lambda p: (min((round(math.dist(p, m)) for m in marks), default=0), p[0]))


def bars(groups: Sequence[RunGroup], by_task: Mapping[str, Sequence[RunGroup]], stacked: bool = False) -> Figure | None:
    """Misaligned and incoherent outside the domain for each defense (rows), one panel for each training task.

    `by_task`: task -> its groups, of one model; `groups` gives the rows and their order. `stacked`: as in `headline`.
    None if there is no task.
    """
    if not by_task:
        return None
    rows = [g.label for g in groups]
    columns = 1 if stacked else min(3, len(by_task))
    lines = -(-len(by_task) // columns)
    height = lines * (0.9 + 0.46 * len(rows))
    width = NARROW_INCHES if stacked else max(6.4, 3.45 * columns + 1.2)
    figure = Figure(figsize=(width, height + 0.2), layout="constrained")
    grid = np.atleast_2d(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False))
    axes = list(grid.flat)
    highest = 0.0
    for axis, (task, present) in zip(axes, by_task.items(), strict=False):
        axis.set_title(task, color=INK)
        for y in sorted(set(range(len(rows))) - {rows.index(group.label) for group in present}):
            axis.annotate("no run", (0, y), xytext=(5, 0), textcoords="offset points", fontsize=8,
                          va="center", color=MUTED, style="italic")  # fmt: skip
        for group in present:
            y = rows.index(group.label)
            pairs = (
                ("general_misaligned", MISALIGNED, -0.19),
                ("general_incoherent", INCOHERENT, 0.19),
            )
            for metric, colour, shift in pairs:
                rate = group.metrics.get(metric)
                if rate is None:
                    continue
                highest = max(highest, rate.high)
                axis.barh(y + shift, rate.rate, height=0.34, color=colour, alpha=0.95, zorder=2)
                axis.errorbar(rate.rate, y + shift, xerr=_whiskers(rate), fmt="none", ecolor=INK,
                              elinewidth=1, capsize=2, capthick=1, zorder=3)  # fmt: skip
                # The number stands beyond the whisker, at a fixed distance whatever the scale.
                axis.annotate(f"{100 * rate.rate:.1f}", (rate.high, y + shift), xytext=(5, 0), fontsize=8,
                              textcoords="offset points", va="center", color=MUTED)  # fmt: skip
        axis.grid(True, axis="x")
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelbottom=True)
        axis.tick_params(axis="y", labelcolor=INK, labelsize=9.5, pad=6)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    for axis in axes[len(by_task) :]:
        axis.set_visible(False)
    axes[0].set(
        yticks=range(len(rows)),
        yticklabels=rows,
        ylim=(len(rows) - 0.45, -0.55),
        xlim=(0, max(0.05, highest) * 1.18),
    )
    for text in axes[0].get_yticklabels():
        text.set_color(INK)
    handles = [
        Patch(color=MISALIGNED, label="misaligned"),
        Patch(color=INCOHERENT, label="incoherent"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, handlelength=0.9, handleheight=0.9)
    return figure
