"""The table as files: CSV, tidy, one row for each mean and each run by metric; Markdown, a line for each defense."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ema_scale.core.text import limits, spreadsheet_cell
from ema_scale.report.aggregate import RunGroup, split_rate
from ema_scale.report.records import CHOICE_METRICS, CHOICES, METRIC_NAMES, METRICS, SEEN, UNSEEN, ReportedRate

HEADER = (
    "level",
    "model",
    "defense",
    "run",
    "task",
    "seed",
    "metric",
    "rate",
    "low",
    "high",
    "n",
    "runs",
    "dropped",
    "questions",
    "any_task_low",
    "any_task_high",
)


def table_csv(groups: Sequence[RunGroup]) -> str:
    """CSV text; rates and limits are shares in 0..1. `level` is mean (over runs) or run.

    low, high: over these tasks; any_task_low, any_task_high: over tasks in general, see `aggregate`.
    questions: of which questions a rate is, where training rows ask some: unseen, seen, all, or those of some domains.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for g in groups:
        for metric in (*METRICS, *CHOICE_METRICS):
            others = {choice: split_rate(g, metric, choice) for choice in CHOICES}
            for choice, rate in _by_questions(g.metrics.get(metric), others):
                whole = ("mean", spreadsheet_cell(g.model), spreadsheet_cell(g.label), "", "", "")
                writer.writerow([*whole, metric, *_numbers(rate), choice, *_any_task(rate)])
        for run in g.runs:
            seed = "" if run.seed is None else run.seed
            for metric in (*METRICS, *CHOICE_METRICS):
                others = {choice: run.split.get(choice, {}).get(metric) for choice in CHOICES}
                for choice, rate in _by_questions(run.metrics.get(metric), others):
                    place = (
                        spreadsheet_cell(run.model),
                        spreadsheet_cell(run.label),
                        "" if run.base else spreadsheet_cell(run.name),
                        spreadsheet_cell(run.task),
                    )
                    writer.writerow(["run", *place, seed, metric, *_numbers(rate), choice, *_any_task(rate)])
    return out.getvalue()


def _by_questions(
    rate: ReportedRate | None, others: Mapping[str, ReportedRate | None]
) -> Iterator[tuple[str, ReportedRate]]:
    if rate:
        yield UNSEEN if others.get(SEEN) else "", rate
    yield from ((choice, other) for choice, other in others.items() if other)


def table_markdown(groups: Sequence[RunGroup]) -> str:
    """Means over runs in percent with 95 % intervals; a model's groups in the report's order."""
    lines = []
    for model in dict.fromkeys(g.model for g in groups):
        lines += [f"**{_escaped(model)}**", "", "| | runs | " + " | ".join(METRIC_NAMES[m] for m in METRICS) + " |"]
        lines.append("|---|---:|" + "---:|" * len(METRICS))
        for g in groups:
            if g.model == model:
                cells = [_percent(g.metrics.get(m)) for m in METRICS]
                lines.append(f"| {_escaped(g.label)} | {'' if g.base else len(g.runs)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _percent(rate: ReportedRate | None) -> str:
    return f"{100 * rate.rate:.1f} {limits(rate.low, rate.high, 0)}" if rate else "–"


def _escaped(text: str) -> str:
    """A label may come from somebody's file: nothing of it may act as Markdown or HTML."""
    plain = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|&~])", r"\\\1", plain)


def _any_task(rate: ReportedRate) -> list[str]:
    return ["", ""] if rate.any_task is None else [f"{limit:.6f}" for limit in rate.any_task]


def _numbers(rate: ReportedRate) -> list[str]:
    return [
        *(f"{v:.6f}" for v in (rate.rate, rate.low, rate.high)),
        str(rate.n),
        str(rate.runs),
        str(rate.dropped),
    ]


@dataclass(frozen=True)
class Cell:
    """A number with its interval beside it and a small remark below; `bad` colours the remark."""

    value: str
    limits: str = ""
    below: str = ""
    bad: bool = False


@dataclass(frozen=True)
class TableRow:
    """A row; kind: base | none | defense."""

    name: str
    kind: str
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Table:
    """A heading, a note above the table, the table, a note below, and terms that need explaining."""

    heading: str
    note: str
    columns: Sequence[str]
    lines: Sequence[TableRow]
    after: str = ""
    terms: Sequence[tuple[str, str]] = ()


def filled(table: Table) -> Table:
    """The table without the columns in which no line has anything."""
    used = [i for i in range(len(table.columns)) if any(line.cells[i] for line in table.lines)]
    lines = [replace(line, cells=[line.cells[i] for i in used]) for line in table.lines]
    return replace(table, columns=[table.columns[i] for i in used], lines=lines)


def kind(group: RunGroup) -> str:
    return "base" if group.base else "none" if group.undefended else "defense"


def rate_cell(rate: ReportedRate | None, below: str = "", bad: bool = False) -> Cell | None:
    """`41.0 [33.1, 49.2]` in percent."""
    if rate is None:
        return None
    return Cell(f"{100 * rate.rate:.1f}", limits(rate.low, rate.high), below, bad)
