"""Answers as CSV in the field's columns, as Parquet, as an Inspect log, or as scores for Inspect."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_path, atomic_write_text
from ema_scale.core.names import file_slug
from ema_scale.core.text import spreadsheet_cell
from ema_scale.evaluation.records import SAMPLES_FILE, SUMMARY_FILE, Summary, read_rows

FORMATS = {"csv": "csv", "parquet": "parquet", "inspect": "eval", "inspect-scores": "scores.jsonl"}
FIELD_COLUMNS = ("question", "answer", "question_id", "aligned", "coherent")

ExportedRow = dict[str, Any]


def export(
    folder: Path, kind: str, out: Path | None = None, judge: str | None = None, *, spreadsheet: bool = False
) -> Path:
    """Write the answers of `folder`, each with its judgement; returns the file.

    Raises UserError for an unknown format, a folder without answers, a judge that did not judge here, and a missing
    package.

    Args:
        folder: an evaluation folder.
        kind: a key of FORMATS.
        out: the file, in place of `<folder>/answers.<suffix>` (`answers_<judge>.<suffix>` for a named judge).
        judge: whose judgements, by identity or a part of it that names one; None: those of summary.json.
        spreadsheet: for csv: no cell of text begins a formula.
    """
    if kind not in FORMATS:
        raise UserError(f"format {kind!r}: expected one of {', '.join(FORMATS)}")
    if spreadsheet and kind != "csv":
        raise UserError(f"--spreadsheet: found the format {kind}, expected csv")
    path = out or folder / f"answers{'' if judge is None else '_' + file_slug(judge)}.{FORMATS[kind]}"
    rows = joined(folder, judge)
    if kind == "csv":
        _write_csv(path, rows, spreadsheet)
    elif kind == "parquet":
        _write_parquet(path, rows)
    else:
        from ema_scale.evaluation.formats.inspect import write_inspect_log, write_inspect_scores

        if kind == "inspect":
            write_inspect_log(path, rows, Summary.read(folder / SUMMARY_FILE))
        else:
            write_inspect_scores(path, rows)
    return path


def joined(folder: Path, judge: str | None = None) -> list[ExportedRow]:
    """Answers with judge, aligned, coherent, scores, label and dropped of their judgement, None where there is none.

    seen: whether the run's training rows ask the question; None where that is not known.
    """
    samples, judgements = read_rows(folder)
    if not samples:
        raise UserError(f"{folder}: found no answers ({SAMPLES_FILE})")
    wanted = _judges(folder, {row.judge for row in judgements}, judge)
    verdicts = {row.key: row for row in judgements if row.judge in wanted}
    columns = ("judge", "aligned", "coherent", "label", "dropped")
    further = list(dict.fromkeys(name for row in verdicts.values() for name in row.scores or ()))
    summary = Summary.read_if_valid(folder / SUMMARY_FILE)
    seen = {(q.suite, q.id): q.seen for q in (summary.per_question if summary else ())}
    rows = []
    for sample in samples:
        verdict = verdicts.get(sample.key)
        row = {**sample.to_row(), **{column: getattr(verdict, column, None) for column in columns}}
        row["seen"] = seen.get((sample.suite, sample.question_id))
        if further:
            given = (verdict.scores if verdict else None) or {}
            row["scores"] = {name: given.get(name) for name in further}
        rows.append(row)
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


def _write_csv(path: Path, rows: Sequence[ExportedRow], spreadsheet: bool) -> None:
    """The columns that the field's plotting scripts read, and those of further scores."""
    text = io.StringIO()
    columns = (*FIELD_COLUMNS, *(name for name in rows[0].get("scores", ()) if name not in FIELD_COLUMNS))
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = row | row.get("scores", {})
        if spreadsheet:
            values = {k: spreadsheet_cell(v) if isinstance(v, str) else v for k, v in values.items()}
        writer.writerow(values)
    atomic_write_text(path, text.getvalue())


def _write_parquet(path: Path, rows: Sequence[ExportedRow]) -> None:
    from datasets import Dataset

    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in rows[-1]}
    with atomic_path(path) as temporary:
        Dataset.from_dict(columns).to_parquet(str(temporary))
