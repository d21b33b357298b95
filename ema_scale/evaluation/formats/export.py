"""Write one evaluation folder as CSV in the field's columns, as Parquet, or as an Inspect log."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_text
from ema_scale.evaluation.records import SAMPLES_FILE, SUMMARY_FILE, Summary, read_rows

FORMATS = {"csv": "csv", "parquet": "parquet", "inspect": "eval"}
FIELD_COLUMNS = ("question", "answer", "question_id", "aligned", "coherent")

ExportedRow = dict[str, Any]


def export(folder: Path, kind: str, out: Path | None = None, judge: str | None = None) -> Path:
    """Write the answers of `folder`, each with its judgement; returns the file (`<folder>/answers.<suffix>`).

    judge: whose judgements, by identity or a part of it that names one; None: those of summary.json.
    Raises UserError for an unknown format, a folder without answers, a judge that did not judge here, and a missing
    package.
    """
    if kind not in FORMATS:
        raise UserError(f"format {kind!r}: expected one of {', '.join(FORMATS)}")
    path = out or folder / f"answers.{FORMATS[kind]}"
    rows = joined(folder, judge)
    if kind == "csv":
        _write_csv(path, rows)
    elif kind == "parquet":
        _write_parquet(path, rows)
    else:
        from ema_scale.evaluation.formats.inspect import write_inspect_log

        write_inspect_log(path, rows, Summary.read(folder / SUMMARY_FILE))
    return path


def joined(folder: Path, judge: str | None = None) -> list[ExportedRow]:
    """Answers with judge, aligned, coherent, label and dropped of their judgement, each None where there is none."""
    samples, judgements = read_rows(folder)
    if not samples:
        raise UserError(f"{folder}: found no answers ({SAMPLES_FILE})")
    wanted = _judges(folder, {row.judge for row in judgements}, judge)
    verdicts = {row.key: row for row in judgements if row.judge in wanted}
    columns = ("judge", "aligned", "coherent", "label", "dropped")
    rows = []
    for sample in samples:
        verdict = verdicts.get(sample.key)
        rows.append({**sample.to_row(), **{column: getattr(verdict, column, None) for column in columns}})
    return rows


def _judges(folder: Path, known: set[str], judge: str | None) -> set[str]:
    if judge is not None:
        found = {name for name in known if judge == name} or {name for name in known if judge in name}
        if len(found) != 1:
            raise UserError(f"{folder}: judge {judge!r}: found {sorted(found) or 'none'} among {sorted(known)}")
        return found
    if not (folder / SUMMARY_FILE).is_file():
        raise UserError(f"{folder}: found no {SUMMARY_FILE}; run `ema eval` to its end first")
    return set(Summary.read(folder / SUMMARY_FILE).judges)


def _write_csv(path: Path, rows: Sequence[ExportedRow]) -> None:
    """The columns that the field's plotting scripts read."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELD_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


def _write_parquet(path: Path, rows: Sequence[ExportedRow]) -> None:
    from datasets import Dataset

    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in rows[-1]}
    temporary = path.with_name(f".{path.name}.tmp")
    Dataset.from_dict(columns).to_parquet(str(temporary))
    temporary.replace(path)
