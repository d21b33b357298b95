"""From run folders to the files of a report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ema_scale.errors import UserError
from ema_scale.rundir import atomic_write_text
from ema_scale.study.report import PAGE
from ema_scale.study.report.aggregate import groups
from ema_scale.study.report.answers import exhibits
from ema_scale.study.report.collect import collect, read_rate
from ema_scale.study.report.facts import facts
from ema_scale.study.report.firmness import firmness_sheet
from ema_scale.study.report.hidden import hidden_sheet
from ema_scale.study.report.html import Across, Section, criteria_rows, render, run_rows
from ema_scale.study.report.paired import paired_sheet
from ema_scale.study.report.pictures import Picture, make_picture, pictures
from ema_scale.study.report.records import Collection
from ema_scale.study.report.scaling import scaling, scaling_sheet, sentences
from ema_scale.study.report.scaling_figure import ALT, CAPTION, scaling_figure
from ema_scale.study.report.table import table_csv, table_markdown
from ema_scale.study.report.verdict import verdict


def write(run_dirs: Sequence[Path], out: Path, title: str) -> Path:
    """See `ema_scale.study.report.write_report`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: found a file, expected a folder to write the report into")
    found = collect(run_dirs)
    every = groups(found)
    sections = []
    for model in found.models or ["no finished run"]:
        of_model = [g for g in every if g.model == model]
        drawn = pictures(found, model, of_model) if of_model else []
        _write_figures(out, drawn)
        shown, notes = exhibits(of_model)
        found.problems += notes
        by_kind = {picture.kind: picture for picture in drawn}
        sheets = [hidden_sheet(of_model, found.bases), paired_sheet(of_model), firmness_sheet(of_model, read_rate)]
        tables = (criteria_rows(of_model), run_rows(of_model))
        kept = [sheet for sheet in sheets if sheet is not None]
        sections.append(Section(model, verdict(of_model), by_kind, *tables, shown, kept))
    sizes = scaling(every)
    across = None
    if sizes is not None:
        sizes_picture = make_picture("scaling", "scaling", ALT, CAPTION, lambda t: scaling_figure(sizes, t))
        drawn = [sizes_picture] if sizes_picture else []
        across = Across(sentences(sizes), drawn, scaling_sheet(sizes))
        _write_figures(out, drawn)
    atomic_write_text(out / "table.csv", table_csv(every))
    atomic_write_text(out / "table.md", table_markdown(every))
    page = out / PAGE
    # The page comes last: if it is there, everything it names is there.
    atomic_write_text(page, render(title, _byline(found), sections, facts(found), found.problems, across))
    return page


def _write_figures(out: Path, drawn: Sequence[Picture]) -> None:
    for picture in drawn:
        atomic_write_text(out / "figures" / f"{picture.name}.svg", picture.light)
        _atomic_write_bytes(out / "figures" / f"{picture.name}.png", picture.png)


def _byline(found: Collection) -> list[str]:
    runs = [run for run in found.runs if run.summary]
    seeds = {run.seed for run in runs}
    samples = sum(int(n) for run in runs if isinstance(n := run.summary.get("samples"), (int, float)))
    counts = [
        (len(runs), "run"),
        (len(found.models), "model"),
        (len(found.tasks), "task"),
        (len({run.label for run in runs if run.specs}), "defense"),
        (len(seeds), "seed"),
        (samples, "answer"),
    ]
    return [f"{count:,} {noun}{'s' if count != 1 else ''}" for count, noun in counts]


def _atomic_write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
