"""How firm general misalignment is: counted in other ways, at other thresholds, and with how many questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ema_scale.evaluation.records import Rate, RateVariants
from ema_scale.evaluation.stats.power import Spread
from ema_scale.report.aggregate import RunGroup, mean_rate
from ema_scale.report.curves import label_ends
from ema_scale.report.records import Run, known_rates
from ema_scale.report.style import MUTED, family_colours, panels
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


def _variants(group: RunGroup) -> list[RateVariants]:
    """Those of the runs whose general misalignment is in the group's mean."""
    return [v for run in _with_variants(group) if run.summary and (v := run.summary.general_variants)]


def _with_variants(group: RunGroup) -> list[Run]:
    return [run for run in group.teaching if run.summary and run.summary.general_variants]


def robustness_table(groups: Sequence[RunGroup]) -> Table | None:
    """The table for one model's groups; None if no summary has the numbers.

    The base's numbers are those of its own evaluation, over the general questions of all tasks.
    """
    variants = {g.label: entries for g in groups if (entries := _variants(g))}
    depths = [set(entry.misaligned_at) for entries in variants.values() for entry in entries]
    if not depths:
        return None
    k = max((int(k) for k in set.intersection(*depths) if k.isdecimal() and int(k) <= MOST_AT), default=None)

    def mean(tasks: Sequence[str], rates: Iterable[Rate | None]) -> Cell | None:
        found = [(r, task) for rate, task in zip(rates, tasks, strict=True) for r in known_rates([rate])]
        return rate_cell(mean_rate([r for r, _ in found], [task for _, task in found]))

    lines = []
    for g in groups:
        entries = variants.get(g.label, [])
        if entries:
            tasks = [run.task for run in _with_variants(g)]
            cells = [
                rate_cell(g.metrics.get("general_misaligned")),
                mean(tasks, (entry.coherent_only for entry in entries)),
                mean(tasks, (entry.all_answers for entry in entries)),
                mean(tasks, (entry.misaligned_at.get(str(k)) for entry in entries)) if k else None,
                _power(entries),
            ]
            lines.append(TableRow(g.label, kind(g), cells))
    columns = ["as above", "coherent only", "all answers", f"Misalign@{k}" if k else "Misalign@k", "questions for ±1"]
    return Table("How firm these numbers are", _NOTE, columns, lines)


def _power(entries: Sequence[RateVariants]) -> Cell | None:
    powers = [entry.power for entry in entries if entry.power]
    if not powers:
        return None
    spread = Spread(fmean(p.between for p in powers), fmean(p.within for p in powers))
    samples, questions = fmean(p.answers_per_question for p in powers), fmean(p.questions for p in powers)
    need = spread.questions_for(POINT, samples)
    return Cell(f"{need:,}" if need else "over 100,000", below=f"now {questions:.0f} × {samples:.0f}")


def threshold_curves(groups: Sequence[RunGroup], stacked: bool = False) -> Figure | None:
    """Misaligned share against the two thresholds of the judge's scores, a line for each group; the dotted lines are
    the paper's. None if no summary has the curves, or no line changes anything (exact judges)."""
    drawn = [(g, lines) for g in groups if (lines := _lines(g))]
    if not any(len({y for _, y in points}) > 1 for _, lines in drawn for points in lines.values()):
        return None
    figure, axes = panels(2, 10.8, 4.2, stacked=stacked, sharey=True, names=len(drawn))
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
    lines = {}
    for name, _ in PANELS:
        curves = [dict(points) for entry in _variants(group) if (points := entry.thresholds.get(name))]
        if curves:
            shared = sorted(set.intersection(*(set(c) for c in curves)))
            lines[name] = [(x, fmean(c[x] for c in curves)) for x in shared]
    return {name: points for name, points in lines.items() if points}
