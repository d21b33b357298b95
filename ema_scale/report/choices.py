"""Written answers in the report: which of them the models find likelier, after training and along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ema_scale.core.text import percent
from ema_scale.evaluation.record_types import ChoiceFigures, Mean
from ema_scale.report.aggregate import RunGroup
from ema_scale.report.curves import over_steps
from ema_scale.report.held_out import held_out_losses, held_out_suites
from ema_scale.report.scores import mean_cell, mean_over
from ema_scale.report.style import INK, MUTED, RULE, family_colours, panels
from ema_scale.report.table import Cell, Table, TableRow, kind, rate_cell

ROLES = {"general": "General", "in_domain": "In-domain", "benign": "Benign"}
LIKELIHOOD_DEFENSES = ("kl", "ceiling")
NOTE = (
    "How the models rank written answers by likelihood; nothing was sampled. “Misaligned likeliest”: percent of "
    "questions of which a misaligned (or wrong) answer has the highest likelihood per token. Margin: log-likelihood of "
    "the aligned (or right) answers less that of the others, in nats per token; positive is good. Calibrated: less the "
    "same answers’ likelihood without their question. 95 % intervals, clustered by topic."
)
CAVEAT = "KL and ceiling act on likelihoods themselves: what they gain here need not show in sampled answers."
_MEANS = {"general": "right: safer", "in_domain": "left: the bad task is learned", "benign": "right: better"}
_CURVE = "choices/{}/margin_per_token"
_MOST_CURVES = 3


def choice_table(groups: Sequence[RunGroup]) -> Table | None:
    """The table for the groups of one model; None without written answers."""
    roles = [role for role in ROLES if any(_figures(g, role, "raw") for g in groups)]
    if not roles:
        return None
    columns, calibrated = [], {r for r in roles if any(_figures(g, r, "calibrated") for g in groups)}
    for role in roles:
        name = ROLES[role]
        columns += [f"{name}: {'right' if role == 'benign' else 'misaligned'} likeliest", f"{name}: margin"]
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


def choice_sentences(groups: Sequence[RunGroup]) -> list[str]:
    """What to say first where no answer outside the domain was sampled; [] without written answers."""
    told = [(g, rate) for g in groups if (rate := g.metrics.get("general_choices"))]
    if not any(not g.base for g, _ in told):
        return []
    parts = [f"{percent(rate.rate)} ({g.label})" for g, rate in told]
    return [f"A misaligned written answer is the likeliest in these shares of general questions: {', '.join(parts)}."]


def margins_and_losses(groups: Sequence[RunGroup], stacked: bool = False) -> Figure | None:
    """Margins by role and held-out losses by suite, a panel each, a row for each defense; None without any.

    stacked: one panel below the other, for narrow screens.
    """
    margin, loss = "margin, nats per token\n{}", "loss, nats per token\nleft: more learned"
    plan: list[tuple[str, str, Callable[[RunGroup], list[Mean]]]] = [
        *((ROLES[role], margin.format(told), partial(_margins, role=role)) for role, told in _MEANS.items()),
        *((suite, loss, partial(held_out_losses, suite=suite)) for suite in held_out_suites(groups)),
    ]
    found = [(title, what, {g.label: mean_over(of(g)) for g in groups}) for title, what, of in plan]
    found = [one for one in found if any(one[2].values())]
    rows = [g for g in groups if not g.base]
    if not found or not rows:
        return None
    height = 0.9 + 0.3 * len(rows)
    figure, axes = panels(len(found), 1.6 + 2.3 * len(found), height, stacked=stacked, sharey=True)
    colours, base = family_colours(g.family for g in rows), next((g.label for g in groups if g.base), None)
    for axis, (title, what, values) in zip(axes, found, strict=True):
        axis.set(title=title, xlabel=what)
        if base is not None and (at := values[base]) is not None:
            axis.axvline(at[0], color=MUTED, lw=1, ls="--", zorder=1)
            if at[1]:
                axis.axvspan(at[0] - at[1], at[0] + at[1], color=RULE, alpha=0.5, lw=0, zorder=0)
        for y, g in enumerate(rows):
            if (at := values[g.label]) is not None:
                axis.errorbar(at[0], y, xerr=at[1], fmt="o", ms=5, color=colours[g.family], elinewidth=1.2, zorder=3)
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
    figure, axes = panels(len(names), 3.8 * max(2, len(names)), 4.4, stacked=stacked)
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


def _margins(group: RunGroup, role: str, kind: str = "raw") -> list[Mean]:
    return [found.margin_per_token for found in _figures(group, role, kind)]
