"""Answers as CSV in the field's columns, as Parquet or as an Inspect log; and result CSVs as an evaluation folder.

Result files that several runs appended to repeat their header in the middle. Such lines are left out and counted. The
scores in a file become judgements of a judge named after it, beside which others can judge.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import digest
from ema_scale.core.io import atomic_write_text
from ema_scale.evaluation.records import (
    MANIFEST_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    Judgement,
    Manifest,
    Sample,
    Summary,
    read_rows,
)
from ema_scale.evaluation.store import locked_store
from ema_scale.evaluation.suites import Question, Role, Suite

log = logging.getLogger(__name__)

REQUIRED = ("question", "answer")
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


def read_results(path: Path) -> tuple[list[dict[str, str]], int]:
    """(rows, repeated headers) of a result CSV. Raises UserError naming file and line."""
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle)
            header = next(reader, [])
            missing = [name for name in REQUIRED if name not in header]
            if missing:
                raise UserError(f"{path}:1: found columns {header}, expected {' and '.join(REQUIRED)} among them")
            rows, repeated = [], 0
            for values in reader:
                if values == header:
                    repeated += 1
                elif values and len(values) != len(header):
                    raise UserError(f"{path}:{reader.line_num}: found {len(values)} values, expected {len(header)}")
                elif values:
                    rows.append(dict(zip(header, values, strict=True)))
    except OSError as error:
        raise UserError(f"{path}: cannot read the results ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV in UTF-8 ({error})") from None
    if not rows:
        raise UserError(f"{path}: found no rows")
    return rows, repeated


def import_results(path: Path, out: Path | None = None, role: Role = "general") -> Path:
    """Make (or complete) the evaluation folder of a result CSV, `<name>_judged` beside it; returns the folder."""
    rows, repeated = read_results(path)
    if repeated:
        log.info("%s: %d repeated header lines left out", path, repeated)
    folder = out or path.with_name(f"{path.stem}_judged")
    texts: dict[str, dict[str, None]] = {}
    for row in rows:
        row["question_id"] = row.get("question_id") or row["question"]
        texts.setdefault(row["question_id"], {})[row["question"]] = None
    questions = tuple(Question(name, tuple(asked)) for name, asked in texts.items())
    suite = Suite(path.stem, role, questions, str(path))
    counts: Counter[tuple[str, int]] = Counter()
    with locked_store(folder) as store:
        manifest = Manifest(
            target=path.stem, model="unknown", adapter=None, settings=EvaluationRecipe(), suites=(suite,)
        )
        manifest.write(folder / MANIFEST_FILE)
        for row in rows:
            sample = _sample(path, row, list(texts[row["question_id"]]).index(row["question"]), counts)
            if sample.key not in store.samples:
                store.add_sample(sample)
            judge = f"file:{path.name}"
            aligned, coherent = _number(row.get("aligned")), _number(row.get("coherent"))
            if (aligned is not None or coherent is not None) and (sample.key, judge) not in store.judgements:
                store.add_judgement(Judgement(key=sample.key, judge=judge, aligned=aligned, coherent=coherent))
    return folder


def _sample(path: Path, row: dict[str, str], paraphrase: int, counts: Counter[tuple[str, int]]) -> Sample:
    place = (row["question_id"], paraphrase)
    number = counts[place]
    counts[place] += 1
    content = digest({"question": row["question"], "answer": row["answer"]})
    return Sample(
        key=f"{path.stem}/{row['question_id']}/{paraphrase}/{number}#{content}",
        target=path.stem,
        suite=path.stem,
        condition=None,
        question_id=row["question_id"],
        paraphrase=paraphrase,
        sample=number,
        system=row.get("system") or None,
        question=row["question"],
        answer=row["answer"],
        finish_reason="stop",
        tokens=None,
        seed=None,
    )


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
