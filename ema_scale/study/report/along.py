"""Misalignment along the training: a line for each defense over the checkpoints that were evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from ema_scale.study.report.aggregate import Group, mean_rate
from ema_scale.study.report.curves import label_ends
from ema_scale.study.report.records import Rate
from ema_scale.study.report.style import Theme, markers

_PANELS = (
    ("general_misaligned", "Misaligned outside the domain"),
    ("in_domain_misaligned", "Misaligned in the trained domain"),
    ("general_incoherent", "Incoherent outside the domain"),
)


def along(groups: Sequence[Group], theme: Theme) -> Figure | None:
    """Rates over steps, means over runs with 95 % intervals; None if no run has two evaluated steps."""
    told = [replace(g, runs=[r for r in g.runs if len(r.along) > 1 and r.teaches]) for g in groups]
    told = [g for g in told if g.runs]
    if not told:
        return None
    figure = Figure(figsize=(11.4, 4.4), layout="constrained")
    colours, marks = theme.colours(g.family for g in told), markers(g.family for g in told)
    for axis, (metric, title) in zip(figure.subplots(1, 3, sharey=True), _PANELS, strict=True):
        _panel(figure, axis, told, metric, colours, marks, theme)
        axis.set(title=title, xlabel="training steps")
    return figure


def _panel(
    figure: Figure,
    axis: Axes,
    groups: Sequence[Group],
    metric: str,
    colours: Mapping[tuple[str, ...], str],
    marks: Mapping[tuple[str, ...], str],
    theme: Theme,
) -> None:
    ends = []
    every: set[int] = set()
    for g in groups:
        means = {s: r for s in _shared_steps(g) if (r := mean_rate(_at(g, s, metric))) is not None}
        if not means:
            continue
        every |= set(means)
        steps, rates = list(means), list(means.values())
        below, above = [r.rate - r.low for r in rates], [r.high - r.rate for r in rates]
        axis.errorbar(
            steps,
            [r.rate for r in rates],
            [below, above],
            color=colours[g.family],
            marker=marks[g.family],
            ms=5,
            lw=1.6,
            elinewidth=0.8,
        )
        ends.append((g.label, float(steps[-1]), rates[-1].rate))
    axis.set_xscale("log")
    axis.set_xticks(sorted(every), [str(s) for s in sorted(every)])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axis.grid(True, axis="y")
    axis.tick_params(length=0, which="both")
    label_ends(figure, axis, ends, theme)


def _shared_steps(group: Group) -> list[int]:
    return sorted(set.intersection(*(set(run.along) for run in group.runs)))


def _at(group: Group, step: int, metric: str) -> list[Rate]:
    return [rate for run in group.runs if (rate := run.along[step].get(metric)) is not None]
