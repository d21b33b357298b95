"""From run folders to the files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_bytes, atomic_write_text
from ema_scale.core.text import percent
from ema_scale.report.aggregate import METHOD, RunGroup, base_of, groups, undefended_of
from ema_scale.report.choices import choice_sentences, choice_table
from ema_scale.report.collect import collect
from ema_scale.report.conditional import conditional_table
from ema_scale.report.display_names import without_strength
from ema_scale.report.examples import Example, examples
from ema_scale.report.held_out import held_out_sentences, held_out_table
from ema_scale.report.judges import other_judges
from ema_scale.report.paired import Comparison, comparisons, differences_csv, paired_table
from ema_scale.report.pictures import PARTIAL, Picture, make_picture, pictures
from ema_scale.report.records import METRIC_NAMES, METRICS, PAGE, Collection, Problem, ReportedRate, Run
from ema_scale.report.relearning import relearning_table
from ema_scale.report.robustness import robustness_table
from ema_scale.report.rules import FAILED, RULES, Share, share_text, standing
from ema_scale.report.run_details import run_details
from ema_scale.report.scaling import ALT, CAPTION, scaling, scaling_figure, scaling_table, sentences
from ema_scale.report.scores import score_sentences, score_table
from ema_scale.report.table import Table, filled, table_csv, table_markdown
from ema_scale.report.unseen import SENTENCE, seen_table
from ema_scale.report.verdict import verdict


def write_partial(run_dirs: Sequence[Path], out: Path, title: str) -> Path:
    """See `ema_scale.report.make.write_partial_report`."""
    found = collect(run_dirs)
    done, every = sum(run.summary is not None for run in found.runs), groups(found)
    sections = []
    for model in found.models:
        of_model = [g for g in every if g.model == model]
        drawn = {picture.kind: picture for picture in pictures(found, model, of_model, PARTIAL)}
        measured = any(g.metrics.get(m) for g in of_model for m in METRICS)
        tables = (criteria_rows(of_model), run_rows(of_model)) if measured else ([], [])
        sections.append(Section(model, [], drawn, *tables, ()))
    found.problems = [p for p in found.problems if p.state == "failed"]
    said = f"Partial: {done} of {found.requested} runs are evaluated. This page is drawn again while the study goes on."
    atomic_write_text(out / PAGE, render(title, _byline(found), sections, [], found.problems, partial=said))
    return out / PAGE


def write(run_dirs: Sequence[Path], out: Path, title: str) -> Path:
    """See `ema_scale.report.make.write_report`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: found a file, expected a folder to write the report into")
    found = collect(run_dirs)
    every = groups(found)
    sections = []
    compared: list[Comparison] = []
    for model in found.models or ["no finished run"]:
        of_model = [g for g in every if g.model == model]
        drawn = pictures(found, model, of_model) if of_model else []
        _write_figures(out, drawn)
        shown, notes = examples(of_model)
        found.problems += notes
        by_kind = {picture.kind: picture for picture in drawn}
        seen = seen_table(of_model)
        paired = comparisons(of_model)
        compared += paired
        sheets = [
            score_table(of_model),
            choice_table(of_model),
            held_out_table(of_model),
            seen,
            conditional_table(of_model, found.bases),
            paired_table(paired),
            robustness_table(of_model),
            other_judges(of_model),
            relearning_table(of_model, found.continued),
        ]
        measured = any(g.metrics.get(m) for g in of_model for m in METRICS)
        learned = held_out_sentences(of_model)
        opening = [] if measured else choice_sentences(of_model, paired) or score_sentences(of_model) or learned
        tables = ([], []) if opening else (criteria_rows(of_model), run_rows(of_model))
        kept = [sheet for sheet in sheets if sheet is not None]
        said = [*(opening or verdict(of_model)), *learned, *([SENTENCE] if seen is not None else [])]
        sections.append(Section(model, list(dict.fromkeys(said)), by_kind, *tables, shown, kept))
    sizes = scaling(every)
    across = None
    if sizes is not None:
        sizes_picture = make_picture("scaling", "scaling", ALT, CAPTION, partial(scaling_figure, sizes))
        drawn = [sizes_picture] if sizes_picture else []
        across = CrossModel(sentences(sizes), drawn, scaling_table(sizes))
        _write_figures(out, drawn)
    atomic_write_text(out / "table.csv", table_csv(every))
    atomic_write_text(out / "differences.csv", differences_csv(compared))
    atomic_write_text(out / "table.md", table_markdown(every))
    page = out / PAGE
    # The page comes last: if it is there, everything it names is there.
    atomic_write_text(page, render(title, _byline(found), sections, run_details(found), found.problems, across))
    return page


def _write_figures(out: Path, drawn: Sequence[Picture]) -> None:
    for picture in drawn:
        atomic_write_text(out / "figures" / f"{picture.name}.svg", picture.svg)
        atomic_write_bytes(out / "figures" / f"{picture.name}.png", picture.png)


def _byline(found: Collection) -> list[str]:
    runs = [run for run in found.runs if run.summary]
    seeds = {run.seed for run in runs}
    samples = sum(run.summary.samples for run in runs if run.summary)
    counts = [
        (len(runs), "run"),
        (len(found.models), "model"),
        (len(found.tasks), "task"),
        (len({tuple(map(without_strength, run.specs)) for run in runs if run.specs}), "defense"),
        (len(seeds), "seed"),
        (samples, "answer"),
    ]
    said = {noun: f"{count:,} {noun}{'s' if count != 1 else ''}" for count, noun in counts}
    settings = len({run.label for run in runs if run.specs})
    if settings > counts[3][0]:
        said["defense"] += f" in {settings} settings"
    return list(said.values())


_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class CriteriaRow:
    """One line of the criteria table."""

    name: str
    note: str
    kind: str
    """base | none | defense | run"""
    rates: Sequence[ReportedRate | None]
    shares: Sequence[Share | None]
    """what is kept of the undefended gain, under the rate it belongs to"""
    dropped: str


@dataclass(frozen=True)
class Section:
    """Everything about one model."""

    model: str
    verdict: Sequence[str]
    pictures: dict[str, Picture]
    rows: Sequence[CriteriaRow]
    runs: Sequence[CriteriaRow]
    exhibits: Sequence[Example]
    sheets: Sequence[Table] = ()


@dataclass(frozen=True)
class CrossModel:
    """What models of several sizes say together."""

    verdict: Sequence[str]
    pictures: Sequence[Picture]
    sheet: Table


def criteria_rows(of_model: Sequence[RunGroup]) -> list[CriteriaRow]:
    """A row for each group, with the share of the undefended gain that it keeps."""
    none = undefended_of(of_model)
    base = base_of(of_model)
    rows = []
    for g in of_model:
        own = not g.base and not g.undefended
        mark = standing(g, none, base) if own else None
        kept = {"in_domain_misaligned": mark.narrow, "benign_learned": mark.benign} if mark else {}
        count = len(g.runs)
        rows.append(
            CriteriaRow(
                g.label,
                "" if g.base else f"{count} run{'s' if count != 1 else ''}",
                "base" if g.base else "none" if g.undefended else "defense",
                [g.metrics.get(m) for m in METRICS],
                [kept.get(m) for m in METRICS],
                _dropped(g.runs),
            )
        )
    return rows


def run_rows(of_model: Sequence[RunGroup]) -> list[CriteriaRow]:
    """A row for each run, the base's included."""
    rows = []
    for g in of_model:
        for run in sorted(g.runs, key=lambda r: (r.task, r.seed or 0, r.name)):
            seed = "" if run.seed is None else f", seed {run.seed}"
            rates = [run.metrics.get(m) for m in METRICS]
            rows.append(CriteriaRow(g.label, f"{run.task}{seed}", "run", rates, [None] * len(METRICS), _dropped([run])))
    return rows


def _dropped(runs: Sequence[Run]) -> str:
    """Dropped rows as a share of all that the rates could have rested on."""
    rates = [rate for run in runs for rate in run.metrics.values() if rate]
    dropped, kept = sum(r.dropped for r in rates), sum(r.n for r in rates)
    return percent(dropped / (dropped + kept)) if dropped + kept else "–"


def environment(templates: Path = _HERE) -> Environment:
    """For pages made from a folder of templates: every value is escaped, and a missing one is an error."""
    made = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A number and its percent sign stay on one line.
    made.filters["tight"] = lambda text: text.replace(" %", "\u00a0%")
    made.filters["used"] = _used
    made.filters["filled"] = filled
    made.filters["kept"] = share_text
    made.filters["pct"] = lambda value: f"{100 * value:.1f}"
    return made


def _used(rows: Sequence[CriteriaRow]) -> list[int]:
    """The metrics that some row has."""
    return [i for i in range(len(METRICS)) if any(row.rates[i] for row in rows)]


def style_sheet() -> Markup:
    """Our own, from the package."""
    return Markup((_HERE / "report.css").read_text(encoding="utf-8"))


def render(
    title: str,
    byline: Sequence[str],
    sections: Sequence[Section],
    facts: Sequence[tuple[str, Sequence[str]]],
    problems: Sequence[Problem],
    across: CrossModel | None = None,
    partial: str = "",
) -> str:
    """The page. Every value is escaped: answers, questions, names and error messages are not ours.

    partial: says that it is not the last page.
    """
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            byline=byline,
            sections=sections,
            across=across,
            partial=partial,
            facts=facts,
            unfinished=[p for p in problems if p.state != "note"],
            notes=[p for p in problems if p.state == "note"],
            metric_names=[METRIC_NAMES[m] for m in METRICS],
            method=METHOD,
            rules=RULES,
            failed=FAILED,
            css=style_sheet(),
        )
    )
