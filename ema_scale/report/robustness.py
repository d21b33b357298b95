"""How firm general misalignment is: counted in other ways, at other thresholds, and with how many questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ema_scale.evaluation.stats.power import Spread
from ema_scale.report.aggregate import RunGroup, mean_rate
from ema_scale.report.curves import label_ends
from ema_scale.report.records import ReportedRate
from ema_scale.report.style import MUTED, family_colours
from ema_scale.report.table import Cell, Table, TableRow, kind, rate_cell

MOST_AT = 10


POINT = 0.01


PANELS = (("aligned_below", "aligned score below"), ("coherent_above", "coherent score above"))


_NOTE = (
    "General misalignment of the same answers, in percent with 95 % intervals: as above (both scores there), among "
    "coherent answers only, and of all answers, those without a score counted as not misaligned. Misalign@k: the share "
    "of questions of which at least one of k answers is misaligned, without bias as in pass@k (arXiv 2107.03374). "
    "The last column says how many questions of this kind, with as many answers each, would give a run ±1 point."
)


def _teaching(group: RunGroup) -> list[Mapping[str, Any]]:
    """The `general_variants` of the runs whose general misalignment is in the group's mean."""
    found = [run.summary.get("general_variants") for run in group.teaching]
    return [entry for entry in found if isinstance(entry, Mapping)]


def robustness_table(groups: Sequence[RunGroup], rate: Callable[[Any], ReportedRate | None]) -> Table | None:
    """The table for one model's groups; None if no summary has the numbers. `rate` reads a metric of a summary.

    The base's numbers are those of its own evaluation, over the general questions of all tasks.
    """
    every = {g.label: _teaching(g) for g in groups}
    depth = [set(entry.get("misaligned_at") or {}) for entries in every.values() for entry in entries]
    if not depth:
        return None
    shared = [int(k) for k in set.intersection(*depth) if str(k).isdigit() and int(k) <= MOST_AT]
    k = max(shared, default=None)

    def mean(entries: Sequence[Mapping[str, Any]], *keys: str) -> Cell | None:
        values = []
        for entry in entries:
            value: Any = entry
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            try:
                values.append(rate(value))
            except ValueError:
                return None
        return rate_cell(mean_rate([v for v in values if v]))

    lines = []
    for g in groups:
        entries = every[g.label]
        if not entries:
            continue
        cells = [rate_cell(g.metrics.get("general_misaligned")), mean(entries, "coherent_only")]
        cells += [mean(entries, "all_answers"), mean(entries, "misaligned_at", str(k)) if k else None, _power(entries)]
        lines.append(TableRow(g.label, kind(g), cells))
    columns = ["as above", "coherent only", "all answers", f"Misalign@{k}" if k else "Misalign@k", "questions for ±1"]
    return Table("How firm these numbers are", _NOTE, columns, lines)


def _power(entries: Sequence[Mapping[str, Any]]) -> Cell | None:
    found = [p for entry in entries if isinstance(p := entry.get("power"), Mapping)]
    try:
        spread = Spread(*(fmean(float(p[name]) for p in found) for name in ("between", "within")))
        samples, questions = (fmean(float(p[name]) for p in found) for name in ("answers_per_question", "questions"))
    except (KeyError, TypeError, ValueError):
        return None
    need = spread.questions_for(POINT, samples)
    return Cell(f"{need:,}" if need else "over 100,000", below=f"now {questions:.0f} × {samples:.0f}")


def threshold_curves(groups: Sequence[RunGroup]) -> Figure | None:
    """Misaligned share against the two thresholds of the judge's scores, a line for each group; the dotted lines are
    the paper's. None if no summary has the curves, or no line changes anything (exact judges)."""
    drawn = [(g, lines) for g in groups if (lines := _lines(g))]
    if not any(len({y for _, y in points}) > 1 for _, lines in drawn for points in lines.values()):
        return None
    figure = Figure(figsize=(10.8, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = family_colours(g.family for g, _ in drawn)
    for axis, (name, text) in zip(axes, PANELS, strict=True):
        ends = []
        for g, lines in drawn:
            if name in lines:
                x, y = zip(*lines[name], strict=True)
                style = (0, (5, 4)) if g.base else "-"
                axis.plot(x, y, color=MUTED if g.base else colours[g.family], lw=1.8, ls=style)
                ends.append((g.label, float(x[-1]), float(y[-1])))
        axis.axvline(30 if name == "aligned_below" else 50, color=MUTED, lw=1, ls=":")
        axis.set(xlabel=text, title="Misaligned outside the domain")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
        axis.grid(True, axis="y")
        axis.tick_params(length=0)
        label_ends(figure, axis, ends)
    return figure


def _lines(group: RunGroup) -> dict[str, list[tuple[float, float]]]:
    """Threshold curves averaged over the group's runs, at the thresholds that all of them have."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, _ in PANELS:
        curves = []
        for entry in _teaching(group):
            thresholds = entry.get("thresholds")
            points = thresholds.get(name) if isinstance(thresholds, Mapping) else None
            try:
                curves.append({float(x): float(y) for x, y in points or ()})
            except (TypeError, ValueError):
                continue
        curves = [c for c in curves if c]
        if curves:
            shared = sorted(set.intersection(*(set(c) for c in curves)))
            found[name] = [(x, fmean(c[x] for c in curves)) for x in shared]
    return {name: points for name, points in found.items() if points}
