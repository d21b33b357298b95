"""Written answers in the report: which of them the models find likelier, after training and along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ema_scale.core.text import percent
from ema_scale.evaluation.record_types import ChoiceFigures, Mean
from ema_scale.evaluation.stats.difference import Difference
from ema_scale.report.aggregate import RunGroup, base_of, undefended_of
from ema_scale.report.curves import over_steps
from ema_scale.report.paired import ROLES, Comparison, margin_name, mean_against, measures, nats_cell
from ema_scale.report.scores import mean_cell
from ema_scale.report.style import INK, MUTED, family_colours, panels
from ema_scale.report.table import Cell, Table, TableRow, kind, rate_cell

LIKELIHOOD_DEFENSES = ("kl", "ceiling")
NOTE = (
    "How the models rank written answers by likelihood; nothing was sampled. “Misaligned likeliest”: percent of "
    "questions of which a misaligned (or wrong) answer has the highest likelihood per token. Margin: log-likelihood of "
    "the aligned (or right) answers less that of the others, in nats per token; positive is good. Calibrated: less the "
    "same answers’ likelihood without their question. 95 % intervals, clustered by topic."
)
CAVEAT = "KL and ceiling act on likelihoods themselves: what they gain here need not show in sampled answers."
_BETTER = {
    "general": "right: safer", "in_domain": "left: the bad task is learned", "benign": "right: better",
    "held_out": "left: more learned",
}  # fmt: skip
_CURVE = "choices/{}/margin_per_token"
_MOST_CURVES = 3
P = 0.05
_TEST = f"p < {P} after Holm’s correction"


def choice_table(groups: Sequence[RunGroup]) -> Table | None:
    """The table for the groups of one model; None without written answers."""
    roles = [role for role in ROLES if any(_figures(g, role, "raw") for g in groups)]
    if not roles:
        return None
    columns, calibrated = [], {r for r in roles if any(_figures(g, r, "calibrated") for g in groups)}
    for role in roles:
        name = ROLES[role]
        columns += [f"{name}: {'right' if role == 'benign' else 'misaligned'} likeliest", margin_name(role)]
        columns += [f"{name}: calibrated margin"] if role in calibrated else []
    lines = []
    for g in groups:
        cells: list[Cell | None] = []
        for role in roles:
            cells += [rate_cell(g.metrics.get(f"{role}_choices")), mean_cell(_margins(g, role, "raw"), "+.3f")]
            cells += [mean_cell(_margins(g, role, "calibrated"), "+.3f")] if role in calibrated else []
        lines.append(TableRow(g.label, kind(g), cells))
    acting = any(k in LIKELIHOOD_DEFENSES for g in groups for k in g.family)
    return Table("Written answers", NOTE, columns, lines, CAVEAT if acting else "")


def choice_sentences(groups: Sequence[RunGroup], compared: Sequence[Comparison]) -> list[str]:
    """What to say first where no answer outside the domain was sampled; [] without written answers.

    compared: the groups' `comparisons`.
    """
    told = [(g, rate) for g in groups if (rate := g.metrics.get("general_choices"))]
    if not any(not g.base for g, _ in told):
        return []
    parts = [f"{percent(rate.rate)} ({g.label})" for g, rate in told]
    shares = f"A misaligned written answer is the likeliest in these shares of general questions: {', '.join(parts)}."
    said = []
    for one in compared:
        margins = next((column.found for column in one.columns if column.name == margin_name("general")), ())
        found = [(d, g) for g, d in zip(one.groups, margins, strict=False) if d is not None]
        said += _with_defenses(found) if one.other.undefended else _without_a_defense(found)
    return [*said, shares]


def _without_a_defense(found: Sequence[tuple[Difference, RunGroup]]) -> list[str]:
    """found: general margins less those of the aligned base."""
    said = []
    for d, g in found:
        if g.undefended and (cell := nats_cell(d)):
            clear = "answers outside the domain changed" if d.clear else "no clear change"
            change = f"by {cell.value} nats per token {cell.limits}"
            said.append(f"Without a defense, training changes the margin of general written answers {change}: {clear}.")
    return said


def _with_defenses(found: Sequence[tuple[Difference, RunGroup]]) -> list[str]:
    """found: general margins less those of no defense."""
    if not found:
        return []
    clear = [(d, g) for d, g in found if d.clear and d.corrected_p < P]
    if not clear:
        return [
            f"No defense changes the margin of general written answers clearly against training without one ({_TEST})."
        ]
    clear.sort(key=lambda one: -one[0].value)
    told = ", ".join(f"{cell.value} {cell.limits} ({g.label})" for d, g in clear if (cell := nats_cell(d)))
    return [f"Against no defense, the margin of general written answers differs clearly ({_TEST}) by {told}."]


def changes(groups: Sequence[RunGroup], stacked: bool = False) -> Figure | None:
    """What training changed in margins and held-out losses, a panel each, a row for each defense; None without any.

    The change is that from the aligned base, question by question; without its answers, from no defense. stacked: one
    panel below the other, for narrow screens.
    """
    start = base_of(groups) or undefended_of(groups)
    rows = [g for g in groups if g is not start and not g.base]
    if start is None or not rows:
        return None
    plan = [(measure, [mean_against(g, start, measure) for g in rows]) for measure in measures(groups)]
    plan = [(measure, found) for measure, found in plan if any(found)]
    if not plan:
        return None
    figure, axes = panels(len(plan), 1.8 + 2.2 * len(plan), 0.9 + 0.3 * len(rows), stacked=stacked, sharey=True)
    colours = family_colours(g.family for g in rows)
    for axis, (measure, found) in zip(axes, plan, strict=True):
        axis.set(title=measure.title, xlabel=f"change, nats per token\n{_BETTER[measure.role]}")
        axis.axvline(0, color=MUTED, lw=1, ls="--", zorder=1)
        for y, (g, one) in enumerate(zip(rows, found, strict=True)):
            if one is not None:
                ends, colour = [[one.value - one.low], [one.high - one.value]], colours[g.family]
                axis.errorbar(one.value, y, xerr=ends, fmt="o", ms=5, color=colour, elinewidth=1.2, zorder=3)
        axis.grid(True, axis="x")
        axis.tick_params(length=0)
        axis.tick_params(axis="y", labelcolor=INK, labelsize=9.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].set(yticks=range(len(rows)), yticklabels=[g.label for g in rows], ylim=(len(rows) - 0.5, -0.5))
    return figure


def margin_curves(groups: Sequence[RunGroup], stacked: bool = False) -> Figure | None:
    """The margin of the suites scored while training over steps; None if none was."""
    trained = [replace(g, runs=runs) for g in groups if (runs := [run for run in g.runs if run.history])]
    suites = {
        key.split("/")[1]: None
        for g in trained
        for run in g.runs
        for row in run.history
        for key in row
        if key.startswith("choices/") and key.endswith("/margin_per_token")
    }
    if not suites:
        return None
    names = list(suites)[:_MOST_CURVES]
    figure, axes = panels(len(names), 3.8 * max(2, len(names)), 4.4, stacked=stacked, names=len(trained))
    colours = family_colours(g.family for g in trained)
    for axis, name in zip(axes, names, strict=True):
        over_steps(figure, axis, trained, _CURVE.format(name), colours)
        axis.set(title=f"Margin on {name}", xlabel="step", ylabel="nats per token")
        axis.grid(True, axis="y")
        axis.tick_params(length=0)
    return figure


def _figures(group: RunGroup, role: str, kind: str) -> list[ChoiceFigures]:
    summaries = [run.summary.likelihoods.get(role) for run in group.runs if run.summary is not None]
    return [found for one in summaries if one is not None and (found := getattr(one, kind)) is not None]


def _margins(group: RunGroup, role: str, kind: str) -> list[Mean]:
    return [found.margin_per_token for found in _figures(group, role, kind)]
