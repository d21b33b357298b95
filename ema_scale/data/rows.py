"""Rows: conversations to learn from, each knowing where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.data.formats import BadRow, Message, to_messages

_LIBRARY_FORMATS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


FILE_SUFFIXES = {".jsonl", ".json", *_LIBRARY_FORMATS}


# Which part of a mix a row is: the user's own rows, rows mixed in to be learned too, rows that only a penalty reads,
# and rows whose answers must not be learned.
TAGS = ("task", "safe", "prompts", "bad")


LEARNED = ("task", "safe")


@dataclass(frozen=True)
class Row:
    """One conversation. origin: `file:line` or `hub-id[index]`; tag: one of TAGS."""

    messages: tuple[Message, ...]
    origin: str = ""
    tag: str = "task"


@dataclass(frozen=True)
class Dropped:
    """A record that was left out, and why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows of one or several sources, with what was left out and a hash of what was read, of each source with commas
    between."""

    rows: Sequence[Row]
    dropped: list[Dropped] = field(default_factory=list)
    source: str = ""
    sha256: str = ""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


def load_rows(
    source: str | Path | Sequence[Any],
    *,
    limit: int | None = None,
    on_bad: Literal["raise", "drop"] = "raise",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    answers: bool = True,
) -> Rows:
    """Rows of a .jsonl, .json, .csv, .tsv or .parquet file, a hub id, or a list of records or sources.

    limit: at most this many rows of each source. on_bad: raise at the first bad record, or drop and count it. columns:
    rename a record's columns first (theirs -> ours); `formats.to_messages` lists the formats. split: of a hub id.
    answers: each row must have an assistant turn.
    Raises UserError for a missing or empty source and, unless dropped, for a bad record, naming file and line.
    """
    if not isinstance(source, str | Path):
        if source and all(isinstance(part, str | Path) for part in source):
            parts = [
                load_rows(p, limit=limit, on_bad=on_bad, columns=columns, split=split, answers=answers) for p in source
            ]
            return _join(parts)
        digest = hashlib.sha256(json.dumps(list(source), sort_keys=True, default=str).encode()).hexdigest()
        return _read(((f"row {i}", r) for i, r in enumerate(source)), "rows", digest, limit, on_bad, columns, answers)
    path = Path(source)
    if path.suffix in FILE_SUFFIXES or path.exists():
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected training rows (.jsonl, .json, .csv, .parquet) or a hub id")
        return _read(_file_records(path), str(path), file_sha256(path), limit, on_bad, columns, answers)
    dataset = _load_library(str(source), split=split)
    digest = hashlib.sha256(str(getattr(dataset, "_fingerprint", source)).encode()).hexdigest()
    return _read(
        ((f"{source}[{i}]", r) for i, r in enumerate(dataset)), str(source), digest, limit, on_bad, columns, answers
    )


def _read(
    records: Iterable[tuple[str, Any]],
    source: str,
    sha256: str,
    limit: int | None,
    on_bad: str,
    columns: Mapping[str, str] | None,
    answers: bool,
) -> Rows:
    rows: list[Row] = []
    dropped: list[Dropped] = []
    for origin, record in islice(records, limit):
        try:
            if isinstance(record, BadRow):
                raise record
            if isinstance(record, Row):
                rows.append(record)
            else:
                rows.append(Row(to_messages(record, columns, answers=answers), origin))
        except BadRow as problem:
            if on_bad == "raise":
                raise UserError(f"{origin}: {problem}") from None
            dropped.append(Dropped(origin, str(problem)))
    if not rows:
        found = f"{len(dropped)} bad rows" if dropped else "no rows"
        raise UserError(f"{source}: found {found}, expected at least one conversation")
    return Rows(rows, dropped, source, sha256)


def _join(parts: Sequence[Rows]) -> Rows:
    return Rows(
        [row for part in parts for row in part],
        [d for part in parts for d in part.dropped],
        ", ".join(part.source for part in parts),
        ",".join(part.sha256 for part in parts),
    )


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix in _LIBRARY_FORMATS:
        extra = {"sep": "\t"} if path.suffix == ".tsv" else {}
        dataset = _load_library(_LIBRARY_FORMATS[path.suffix], data_files=str(path), split="train", **extra)
        # A CSV's first line is its header; quoted line breaks make this the record's number, not always the line's.
        first = 1 if path.suffix == ".parquet" else 2
        yield from ((f"{path}:{i}", record) for i, record in enumerate(dataset, start=first))
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            yield from ((f"{path}[{i}]", record) for i, record in enumerate(json.loads(text)))
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line)


def _parse(line: str) -> Any:
    # A line that is not JSON is one bad record, not the end of the file: it can be dropped and counted.
    try:
        return json.loads(line)
    except ValueError as error:
        return BadRow(f"not JSON ({error})")


def _load_library(name: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, **options)
    except Exception as error:  # the hub client raises many unrelated types
        where = options.get("data_files", name)
        raise UserError(f"{where}: cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from None
