"""Results that are there: `ema results` shows rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.app import app, console
from ema_scale.core.errors import UserError

RESULT_FILES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def evaluations(path: Path) -> list[Path]:
    """The evaluations of a result file, one per model in it; any other path as it is."""
    from ema_scale.evaluation.formats.results import import_results

    return import_results(path) if path.suffix in RESULT_FILES else [path]


@app.command()
def results(
    paths: Annotated[
        list[Path], typer.Argument(help="result files (CSV, TSV, JSON, JSONL, Parquet), or evaluated runs")
    ],
    column: Annotated[
        list[str] | None,
        typer.Option(help="answer=NAME, aligned=NAME, evil=NAME: which column holds what (repeat)"),
    ] = None,
    by: Annotated[str | None, typer.Option(help="column that tells the arms apart; default: that of the model")] = None,
    legacy: Annotated[bool, typer.Option("--legacy", help="count as the paper's released evaluator does")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of text")] = False,
) -> None:
    """Show rates of result files or evaluated runs.

    With 95 % intervals. Published result files are read by their own scores.
    """
    from ema_scale.evaluation.formats.results import import_results
    from ema_scale.evaluation.judging.rejudge import eval_folders
    from ema_scale.evaluation.records import SUMMARY_FILE, Summary
    from ema_scale.evaluation.table import rates_table

    given = {}
    for item in column or ():
        role, equals, name = item.partition("=")
        if not equals or not role or not name:
            raise UserError(f"--column: found {item!r}, expected such as answer=response")
        given[role] = name
    folders: list[Path] = []
    for path in paths:
        if path.suffix in RESULT_FILES:
            folders += import_results(path, columns=given, by=by, legacy=legacy)
        elif given or by or legacy:
            raise UserError(f"{path}: --column, --by and --legacy are for result files, such as a .csv")
        else:
            folders += eval_folders(path)
    found = {str(f): Summary.read(f / SUMMARY_FILE) for f in folders if (f / SUMMARY_FILE).is_file()}
    if as_json:
        print(json.dumps({name: summary.to_json() for name, summary in found.items()}, indent=1))
    elif found:
        names = [s.name for s in found.values()]
        shown = found if len(set(names)) < len(names) else dict(zip(names, found.values(), strict=True))
        console.print(rates_table(shown, means=True))
