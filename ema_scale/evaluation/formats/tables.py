"""Answers as CSV in the field's columns, as Parquet, as an Inspect log, or as scores for Inspect."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_path
from ema_scale.core.names import file_slug
from ema_scale.core.text import spreadsheet_cell
from ema_scale.evaluation.records import SAMPLES_FILE, SUMMARY_FILE, Sample, Summary
from ema_scale.evaluation.store import Store

FORMATS = {"csv": "csv", "parquet": "parquet", "inspect": "eval", "inspect-scores": "scores.jsonl"}
ROWS_PER_CHUNK = 20_000
FIELD_COLUMNS = ("question", "answer", "question_id", "aligned", "coherent")

ExportedRow = dict[str, Any]


def export(folder: Path, kind: str, judge: str | None = None, *, spreadsheet: bool = False) -> Path:
    """Write the answers of `folder`, each with its judgement, to `answers.<suffix>` in it; returns the file.

    Raises UserError for an unknown format, a folder without answers, a judge that did not judge here, and a missing
    package.

    Args:
        folder: an evaluation folder.
        kind: a key of FORMATS.
        judge: whose judgements, by identity or a part of it that names one, which the file then has in its name; None:
            those of summary.json.
        spreadsheet: for csv: no cell of text begins a formula.
    """
    if kind not in FORMATS:
        raise UserError(f"format {kind!r}: expected one of {', '.join(FORMATS)}")
    if spreadsheet and kind != "csv":
        raise UserError(f"--spreadsheet: found the format {kind}, expected csv")
    path = folder / f"answers{'' if judge is None else '_' + file_slug(judge)}.{FORMATS[kind]}"
    rows = joined(folder, judge)
    if kind == "csv":
        _write_csv(path, rows, spreadsheet)
    elif kind == "parquet":
        _write_parquet(path, rows)
    else:
        from ema_scale.evaluation.formats.inspect import write_inspect_log, write_inspect_scores

        if kind == "inspect":
            write_inspect_log(path, list(rows), Summary.read(folder / SUMMARY_FILE))
        else:
            write_inspect_scores(path, list(rows))
    return path


def joined(folder: Path, judge: str | None = None) -> Iterator[ExportedRow]:
    """Answers with judge, aligned, coherent, scores, label and dropped of their judgement, None where there is none.

    seen: whether the run's training rows ask the question; None where that is not known.
    """
    samples = (sample for _, sample in Sample.scan_objects(folder / SAMPLES_FILE))
    first = next(samples, None)
    if first is None:
        raise UserError(f"{folder}: found no answers ({SAMPLES_FILE})")
    judgements = Store(folder).judgements
    wanted = _judges(folder, {name for name in judgements.judges if any(judgements.in_use_by(name))}, judge)
    further = judgements.score_names(wanted)
    summary = Summary.read_if_valid(folder / SUMMARY_FILE)
    seen = {(q.suite, q.id): q.seen for q in (summary.per_question if summary else ())}

    def row(sample: ExportedRow) -> ExportedRow:
        by, verdict = judgements.last_of(sample["key"], wanted) or (None, None)
        columns = {name: getattr(verdict, name, None) for name in ("aligned", "coherent", "label", "dropped")}
        found = {**sample, "judge": by, **columns}
        found["seen"] = seen.get((sample["suite"], sample["question_id"]))
        if further:
            given = (verdict.scores if verdict else None) or {}
            found["scores"] = {name: given.get(name) for name in further}
        return found

    return map(row, chain([first], samples))


def _judges(folder: Path, known: Collection[str], judge: str | None) -> set[str]:
    if judge is not None:
        found = {name for name in known if judge == name} or {name for name in known if judge in name}
        if len(found) != 1:
            raise UserError(f"{folder}: judge {judge!r}: found {sorted(found) or 'none'} among {sorted(known)}")
        return found
    if not (folder / SUMMARY_FILE).is_file():
        raise UserError(f"{folder}: found no {SUMMARY_FILE}; run `ema eval` to its end first")
    return set(Summary.read(folder / SUMMARY_FILE).judges)


def _write_csv(path: Path, rows: Iterator[ExportedRow], spreadsheet: bool) -> None:
    """The columns that the field's plotting scripts read, and those of further scores."""
    first = next(rows)
    columns = (*FIELD_COLUMNS, *(name for name in first.get("scores", ()) if name not in FIELD_COLUMNS))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in chain([first], rows):
            values = row | row.get("scores", {})
            if spreadsheet:
                values = {k: spreadsheet_cell(v) if isinstance(v, str) else v for k, v in values.items()}
            writer.writerow(values)


def _write_parquet(path: Path, rows: Iterator[ExportedRow]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # The columns' types are known after the last row only, so chunks wait, compressed.
    chunks, schemas, last = list[Any](), list[pa.Schema](), dict[str, Any]()
    while chunk := list(islice(rows, ROWS_PER_CHUNK)):
        last = chunk[-1]
        table = pa.Table.from_struct_array(pa.array(chunk))
        out = pa.BufferOutputStream()
        parquet.write_table(table, out, compression="zstd")
        chunks.append(out.getvalue())
        schemas.append(table.schema)
    whole = pa.unify_schemas(schemas, promote_options="permissive")
    schema = pa.schema([whole.field(name) for name in last])
    with atomic_path(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for data in chunks:
            table = pa.concat_tables(
                [parquet.read_table(pa.BufferReader(data)), schema.empty_table()], promote_options="permissive"
            )
            writer.write_table(table.select(list(last)).cast(schema))
