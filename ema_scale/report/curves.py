"""Training curves and the per-question heat map."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from ema_scale.evaluation.records import QuestionSummary
from ema_scale.report.aggregate import RunGroup, mean_rate
from ema_scale.report.records import ReportedRate, Run
from ema_scale.report.style import (
    ABOUT_AXES,
    HEAT,
    INK,
    LINE,
    MUTED,
    NARROW_INCHES,
    PAPER,
    family_colours,
    markers,
    panels,
    spread_labels,
)

_DRIFT = re.compile(r"drift/layer_(\d+)$")
# The most telling questions of each role; a longer map is not read.
MAX_QUESTIONS = {"general": 30, "in_domain": 12}


def series(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one key of metrics.jsonl; rows without a finite number are left out."""
    points = {}
    for row in run.history:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, (int, float)) and isinstance(value, (int, float)) and np.isfinite(value):
            points[float(step)] = float(value)
    steps = sorted(points)
    return np.array(steps), np.array([points[s] for s in steps])


def last_drift(run: Run) -> dict[int, float]:
    """Relative l2 drift per layer at the last step that logged it."""
    for row in reversed(run.history):
        found = {
            int(m[1]): float(v) for k, v in row.items() if (m := _DRIFT.match(str(k))) and isinstance(v, (int, float))
        }
        if found:
            return found
    return {}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean; at the ends over the values there are."""
    if width < 2 or len(values) < 3:
        return values
    kernel = np.ones(min(width | 1, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def curves(groups: Sequence[RunGroup], stacked: bool = False) -> Figure | None:
    """CE, KL and drift per layer: a line for each defense (mean over runs), thin lines for its runs.

    `groups`: those of one model. None if no run logged anything.
    """
    kept = {g: [run for run in g.runs if run.history] for g in groups}
    if any(run.teaches for runs in kept.values() for run in runs):
        # Losses of narrow and benign tasks have no common mean.
        kept = {g: [run for run in runs if run.teaches] for g, runs in kept.items()}
    trained = [replace(g, runs=runs) for g, runs in kept.items() if runs]
    if not trained:
        return None
    figure, (ce, kl, drift) = panels(3, 11.4, 4.4, stacked=stacked, names=len(trained))
    colours = family_colours(g.family for g in trained)
    over_steps(figure, ce, trained, "ce", colours)
    over_steps(figure, kl, trained, "kl", colours)
    _over_layers(figure, drift, trained, colours)
    ce.set(title="Cross-entropy", xlabel="step", ylabel="nats per assistant token")
    kl.set(title="KL to the aligned base", xlabel="step", ylabel="nats per token")
    drift.set(title="Drift of the hidden states", xlabel="layer", ylabel="relative distance at the end")
    for axis in (ce, kl, drift):
        axis.grid(True, axis="y")
        axis.tick_params(length=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _mean_curve(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs at the steps that all of them logged (all steps of the first if they share none)."""
    shared = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in runs)))
    if not shared:
        return runs[0]
    values = [np.interp(shared, steps, values) for steps, values in runs]
    return np.array(shared), np.mean(values, axis=0)


def over_steps(
    figure: Figure,
    axis: Axes,
    groups: Sequence[RunGroup],
    key: str,
    colours: Mapping[tuple[str, ...], str],
) -> None:
    """One key of metrics.jsonl over steps: a line per group (mean over runs), thin lines for its runs."""
    ends = []
    for g in groups:
        runs = [s for run in g.runs if len((s := series(run, key))[0])]
        if not runs:
            continue
        width = max(1, len(runs[0][0]) // 12)
        for steps, values in runs if len(runs) > 1 else ():
            axis.plot(steps, smooth(values, width), color=colours[g.family], lw=0.7, alpha=0.25)
        steps, values = _mean_curve(runs)
        axis.plot(steps, smooth(values, width), color=colours[g.family], lw=1.8)
        ends.append((g.label, float(steps[-1]), float(smooth(values, width)[-1])))
    label_ends(figure, axis, ends)


def _over_layers(
    figure: Figure, axis: Axes, groups: Sequence[RunGroup], colours: Mapping[tuple[str, ...], str]
) -> None:
    ends = []
    for g in groups:
        runs = [d for run in g.runs if (d := last_drift(run))]
        if not runs:
            continue
        layers = sorted(set.intersection(*(set(d) for d in runs)))
        for one in runs if len(runs) > 1 else ():
            axis.plot(sorted(one), [one[k] for k in sorted(one)], color=colours[g.family], lw=0.7, alpha=0.25)
        means = [fmean(d[k] for d in runs) for k in layers]
        axis.plot(layers, means, color=colours[g.family], lw=1.8, marker="o", ms=3.5)
        if layers:
            ends.append((g.label, float(layers[-1]), means[-1]))
    label_ends(figure, axis, ends)


def label_ends(figure: Figure, axis: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Names at the right ends of the lines, moved apart where they would overlap."""
    if not ends:
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color=MUTED)
        axis.set(xticks=[], yticks=[])
        return
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    low, high = axis.get_ylim()
    rows = grid.nrows if (grid := axis.get_gridspec()) is not None else 1
    gap = (high - low) * LINE / (figure.get_figheight() / rows - ABOUT_AXES)
    places = spread_labels([y for *_, y in ends], gap, low + gap / 2, high - gap / 2)
    right = max(x for _, x, _ in ends)
    left = axis.get_xlim()[0]
    for (name, x, y), place in zip(ends, places, strict=True):
        axis.annotate(
            name,
            (x, y),
            xytext=(right + 0.09 * (right - left), place),
            fontsize=8.5,
            va="center",
            color=INK,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 0},
        )
    axis.set_xlim(left, right)
    for mark in (*axis.lines, *axis.collections):
        mark.set_clip_on(False)  # the last ones stand on the edge


def heat_map(groups: Sequence[RunGroup], stacked: bool = False) -> Figure | None:
    """Share of misaligned answers for each question (rows) and defense (columns), mean over runs.

    Shows at most MAX_QUESTIONS of a role: those on which the defenses differ most. None if there are none. `stacked`:
    for narrow screens, a few defenses above the next few, each block with the questions.
    """
    tables = [question_means(g.runs) for g in groups]
    undefended = next((i for i, g in enumerate(groups) if g.undefended), 0)
    keys = _most_telling(tables, undefended) if tables else []
    if not keys:
        return None
    values = np.array([[table[k][1] if k in table else np.nan for table in tables] for k in keys])
    texts = [next(table[k][0] for table in tables if k in table) for k in keys]
    labels, roles = [g.label for g in groups], [key[0] for key in keys]
    height = 1.5 + 0.235 * len(keys)
    if not stacked:
        figure, (axis,) = panels(1, max(7.5, 4.6 + 0.62 * len(groups)), height, stacked=False)
        _heat_block(axis, values, [plain(text, 58) for text in texts], labels, roles)
        return figure
    blocks = -(-len(groups) // _NARROW_COLUMNS)
    figure, axes = panels(blocks, NARROW_INCHES, height, stacked=True)
    for axis, columns in zip(axes, np.array_split(np.arange(len(groups)), blocks), strict=True):
        _heat_block(axis, values[:, columns], [plain(text, 32) for text in texts], [labels[i] for i in columns], roles)
    return figure


_NARROW_COLUMNS = 6


def _heat_block(
    axis: Axes, values: np.ndarray, questions: Sequence[str], labels: Sequence[str], roles: Sequence[str]
) -> None:
    axis.set(xlim=(-0.5, len(labels) - 0.5), ylim=(len(questions) - 0.5, -0.5))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            cell, ink = HEAT[round(100 * value)]
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=cell, lw=0))
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
        else:
            axis.text(column, row, "·", ha="center", va="center", color=MUTED)
    axis.set_yticks(range(len(questions)), questions, fontsize=8)
    axis.set_xticks(range(len(labels)), labels, rotation=38, ha="left", rotation_mode="anchor")
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelcolor=INK)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xticks(np.arange(len(labels) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(questions) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color=PAPER, linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    for row in range(1, len(roles)):
        if roles[row] != roles[row - 1]:
            axis.axhline(row - 0.5, color=INK, lw=1.2)
    for role, name in (("general", "outside the domain"), ("in_domain", "in the domain")):
        if role in roles:
            middle = (roles.index(role) + len(roles) - 1 - roles[::-1].index(role)) / 2
            axis.text(1.01, middle, name, transform=axis.get_yaxis_transform(), rotation=270, va="center",
                      color=MUTED, fontsize=9)  # fmt: skip


def question_means(runs: Sequence[Run]) -> dict[tuple[str, str, str], tuple[str, float]]:
    """(role, id, text) -> (text, mean share misaligned over runs); general and in-domain questions only.

    A question that several suites ask under the same id is one question.
    """
    found: dict[tuple[str, str, str], list[QuestionSummary]] = {}
    for run in runs:
        for q in run.questions:
            if q.role in ("general", "in_domain") and q.misaligned is not None and run.teaches:
                found.setdefault((q.role, q.id, q.text), []).append(q)
    return {k: (qs[0].text, fmean(q.misaligned for q in qs if q.misaligned is not None)) for k, qs in found.items()}


def _most_telling(
    tables: Sequence[Mapping[tuple[str, str, str], tuple[str, float]]], undefended: int
) -> list[tuple[str, str, str]]:
    """Keys by role, within a role by how misaligned the undefended run is."""
    spans: dict[tuple[str, str, str], float] = {}
    for key in {key for table in tables for key in table}:
        values = [table[key][1] for table in tables if key in table]
        spans[key] = max(values) - min(values)
    chosen = []
    for role, most in MAX_QUESTIONS.items():
        chosen += sorted((k for k in spans if k[0] == role), key=lambda k: (-spans[k], k))[:most]
    first = tables[undefended]
    return sorted(chosen, key=lambda k: (k[0], -first[k][1] if k in first else 0.0, k))


def plain(text: str, limit: int) -> str:
    """One printable line of at most `limit` characters, safe to draw."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


_PANELS = (
    ("general_misaligned", "Misaligned outside the domain"),
    ("in_domain_misaligned", "Misaligned in the trained domain"),
    ("general_incoherent", "Incoherent outside the domain"),
)


def along_training(groups: Sequence[RunGroup], stacked: bool = False) -> Figure | None:
    """Rates over steps, means over runs with 95 % intervals; None if no run has two evaluated steps."""
    told = [replace(g, runs=[r for r in g.runs if len(r.along) > 1 and r.teaches]) for g in groups]
    told = [g for g in told if g.runs]
    if not told:
        return None
    figure, axes = panels(3, 11.4, 4.4, stacked=stacked, sharey=True, names=len(told))
    colours, marks = family_colours(g.family for g in told), markers(g.family for g in told)
    for axis, (metric, title) in zip(axes, _PANELS, strict=True):
        _panel(figure, axis, told, metric, colours, marks)
        axis.set(title=title, xlabel="training steps")
    return figure


def _panel(
    figure: Figure,
    axis: Axes,
    groups: Sequence[RunGroup],
    metric: str,
    colours: Mapping[tuple[str, ...], str],
    marks: Mapping[tuple[str, ...], str],
) -> None:
    ends = []
    every: set[int] = set()
    for g in groups:
        means = {s: r for s in _shared_steps(g) if (r := _mean_at(g, s, metric)) is not None}
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
    label_ends(figure, axis, ends)


def _shared_steps(group: RunGroup) -> list[int]:
    return sorted(set.intersection(*(set(run.along) for run in group.runs)))


def _mean_at(group: RunGroup, step: int, metric: str) -> ReportedRate | None:
    found = [(rate, run.task) for run in group.runs if (rate := run.along[step].get(metric)) is not None]
    return mean_rate([rate for rate, _ in found], [task for _, task in found])
