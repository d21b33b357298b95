"""The table as CSV: one row for each mean and each run, by metric, tidy."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ema_scale.study.report.aggregate import Group
from ema_scale.study.report.records import METRICS, Rate

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
)


def table_csv(groups: Sequence[Group]) -> str:
    """CSV text; rates and limits are shares in 0..1. `level` is mean (over runs) or run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for g in groups:
        for metric in METRICS:
            if rate := g.metrics.get(metric):
                writer.writerow(["mean", _cell(g.model), _cell(g.label), "", "", "", metric, *_numbers(rate)])
        for run in g.runs:
            seed = "" if run.seed is None else run.seed
            for metric in METRICS:
                if rate := run.metrics.get(metric):
                    place = (
                        _cell(run.model),
                        _cell(run.label),
                        "" if run.base else _cell(run.name),
                        _cell(run.task),
                    )
                    writer.writerow(["run", *place, seed, metric, *_numbers(rate)])
    return out.getvalue()


def _numbers(rate: Rate) -> list[str]:
    return [
        *(f"{v:.6f}" for v in (rate.rate, rate.low, rate.high)),
        str(rate.n),
        str(rate.runs),
        str(rate.dropped),
    ]


def _cell(text: str) -> str:
    """A spreadsheet runs a cell that starts with one of these; a leading quote makes it text."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
