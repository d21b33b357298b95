"""The page itself: one file, no script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ema_scale.study.report.aggregate import METHOD, Group
from ema_scale.study.report.answers import Exhibit
from ema_scale.study.report.pictures import Picture
from ema_scale.study.report.records import METRIC_NAMES, METRICS, Problem, Rate, Run
from ema_scale.study.report.sheet import Sheet
from ema_scale.study.report.verdict import KEEP, RULES, standing

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One line of the criteria table."""

    name: str
    note: str
    kind: str
    """base | none | defense | run"""
    rates: Sequence[Rate | None]
    shares: Sequence[float | None]
    """what is kept of the undefended gain, under the rate it belongs to"""
    dropped: str


@dataclass(frozen=True)
class Section:
    """Everything about one model."""

    model: str
    verdict: Sequence[str]
    pictures: dict[str, Picture]
    rows: Sequence[Row]
    runs: Sequence[Row]
    exhibits: Sequence[Exhibit]
    sheets: Sequence[Sheet] = ()


@dataclass(frozen=True)
class Across:
    """What models of several sizes say together."""

    verdict: Sequence[str]
    pictures: Sequence[Picture]
    sheet: Sheet


def criteria_rows(of_model: Sequence[Group]) -> list[Row]:
    """A row for each group, with the share of the undefended gain that it keeps."""
    none = next((g for g in of_model if g.undefended), None)
    base = next((g for g in of_model if g.base), None)
    rows = []
    for g in of_model:
        mark = standing(g, none, base)
        kept = {"in_domain_misaligned": mark.narrow, "benign_learned": mark.benign}
        own = not g.base and not g.undefended
        count = len(g.runs)
        rows.append(
            Row(
                g.label,
                "" if g.base else f"{count} run{'s' if count != 1 else ''}",
                "base" if g.base else "none" if g.undefended else "defense",
                [g.metrics.get(m) for m in METRICS],
                [kept.get(m) if own else None for m in METRICS],
                _dropped(g.runs),
            )
        )
    return rows


def run_rows(of_model: Sequence[Group]) -> list[Row]:
    """A row for each run, the base's included."""
    rows = []
    for g in of_model:
        for run in sorted(g.runs, key=lambda r: (r.task, r.seed or 0, r.name)):
            seed = "" if run.seed is None else f", seed {run.seed}"
            rates = [run.metrics.get(m) for m in METRICS]
            rows.append(Row(g.label, f"{run.task}{seed}", "run", rates, [None] * len(METRICS), _dropped([run])))
    return rows


def _dropped(runs: Sequence[Run]) -> str:
    """Dropped rows as a share of all that the rates could have rested on."""
    rates = [rate for run in runs for rate in run.metrics.values() if rate]
    dropped, kept = sum(r.dropped for r in rates), sum(r.n for r in rates)
    return f"{100 * dropped / (dropped + kept):.1f} %" if dropped + kept else "–"


def environment() -> Environment:
    """For pages of ours: every value is escaped, and one that is missing is an error."""
    made = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A number and its percent sign stay on one line.
    made.filters["tight"] = lambda text: text.replace(" %", "\u00a0%")
    made.filters["pct"] = lambda value: f"{100 * value:.1f}"
    return made


def style_sheet() -> Markup:
    """Our own, from the package."""
    return Markup((_HERE / "report.css").read_text(encoding="utf-8"))


def render(
    title: str,
    byline: Sequence[str],
    sections: Sequence[Section],
    facts: Sequence[tuple[str, Sequence[str]]],
    problems: Sequence[Problem],
    across: Across | None = None,
) -> str:
    """The page. Every value is escaped: answers, questions, names and error messages are not ours."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            byline=byline,
            sections=sections,
            across=across,
            facts=facts,
            unfinished=[p for p in problems if p.state != "note"],
            notes=[p for p in problems if p.state == "note"],
            metric_names=[METRIC_NAMES[m] for m in METRICS],
            method=METHOD,
            rules=RULES,
            keep=KEEP,
            css=style_sheet(),
        )
    )
