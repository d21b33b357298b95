"""Files as records: JSON lines, JSON, CSV, TSV and Parquet, read directly, each record with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import open_file, parse_json, text_lines, unique_keys, what_it_is
from ema_scale.data.values import BadRow

TABLES = (".csv", ".tsv", ".parquet")
SUFFIXES = {".jsonl", ".json", *TABLES}
_FILE_LIMIT = 1 << 32  # of JSON that has to be read whole
_FIELD_LIMIT = 2**31 - 1  # csv's own limit is 128 KiB per field
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record of a file; a record that cannot be read is a BadRow with the reason.

    Every field of a CSV or TSV is text, as it stands there: numbers, `NA` and `null` too. JSON may be lines, one list,
    one object that holds a list of rows, or pretty-printed objects behind one another.
    Raises UserError if the file as a whole cannot be read.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; name one of its files (.jsonl, .json, .csv, .tsv, .parquet)")
    try:
        with open_file(path) as file:
            start = file.read(200)
        _refuse_other_kinds(path, start)
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv(path, "\t" if suffix == ".tsv" else ",")
        else:
            yield from _json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def check_beginning(path: Path) -> None:
    """Raises UserError for a file that cannot be rows, by its beginning (a table's end), before all of it is read."""
    with open_file(path) as file:
        start = file.read(200)
        _refuse_other_kinds(path, start)
        file.seek(0)
        if path.suffix.lower() == ".parquet":
            _parquet_of(path).close()
            return
        try:
            next(text_lines(path, file), None)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    if not start:
        raise UserError(f"{path}: found no rows: the file is empty")
    if what := what_it_is(start):
        raise UserError(f"{path}: {what}")
    if start.startswith(b"PAR1") and path.suffix.lower() != ".parquet":
        raise UserError(f"{path}: a Parquet file; call it .parquet")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    number = 0
    with _parquet_of(path) as file:
        try:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]})") from None


def _parquet_of(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]})") from None


def _csv(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_FIELD_LIMIT)
    with path.open("rb") as file:
        reader = csv.reader(text_lines(path, file), delimiter=delimiter, strict=True)
        try:
            header = next((fields for fields in reader if fields), None)
            if header is None:
                raise UserError(f"{path}: the file has no header, expected names of columns in its first line")
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise UserError(f"{path}: two columns have the name {', '.join(map(repr, twice))}")
            other = {",": ";\t", "\t": ",;"}[delimiter]
            if len(header) == 1 and any(mark in header[0] for mark in other):
                raise UserError(
                    f"{path}: found the one column {header[0]!r}, expected columns with {delimiter!r} between"
                )
            before = reader.line_num
            for fields in reader:
                place, before = f"{path}:{before + 1}", reader.line_num
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield place, BadRow(f"found {len(fields)} fields, expected {len(header)} as in the header")
                else:
                    yield place, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        first = next((line for line in text_lines(path, file) if line.strip()), "").strip()
    if first in ("[", "{") or (first.startswith("[") and path.suffix.lower() == ".json"):
        yield from _whole(path)
        return
    found = _parse(first) if first else None
    if isinstance(found, BadRow) or _holds_rows(found):
        with path.open("rb") as file:
            single = sum(1 for line in text_lines(path, file) if line.strip()) == 1
        if single and not isinstance(found, BadRow):
            yield from _of_value(path, found)
            return
        if isinstance(found, BadRow) and (value := _whole_or_none(path)) is not None:
            yield from _of_value(path, value)
            return
    with path.open("rb") as file:
        for number, line in enumerate(text_lines(path, file), start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)


def _parse(line: str) -> Any:
    # A line that is not JSON is one bad record, not the end of the file: it can be dropped and counted.
    try:
        return parse_json(line, "", allow_nan=True)
    except UserError as error:
        return BadRow(str(error).removeprefix(": "))


def _whole(path: Path) -> Iterator[tuple[str, Any]]:
    """One list, one object, or objects over several lines behind one another."""
    text, position = _text(path), 0
    values: list[tuple[int, Any]] = []
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        try:
            value, end = _DECODER.raw_decode(text, position)
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        except RecursionError:
            raise UserError(f"{path}: not rows: JSON that is nested too deeply") from None
        values.append((text.count("\n", 0, position) + 1, value))
        position = end
    if len(values) == 1:
        yield from _of_value(path, values[0][1])
        return
    yield from ((f"{path}:{line}", value) for line, value in values)


def _whole_or_none(path: Path) -> Any:
    try:
        return parse_json(_text(path), "", allow_nan=True)
    except UserError:
        return None


def _text(path: Path) -> str:
    if path.stat().st_size > _FILE_LIMIT:
        raise UserError(f"{path}: over {_FILE_LIMIT >> 30} GiB of JSON in one piece; write one row per line (.jsonl)")
    return path.read_text(encoding="utf-8-sig")


def _of_value(path: Path, value: Any) -> Iterator[tuple[str, Any]]:
    """The records of a file that is one JSON value."""
    if isinstance(value, list):
        yield from ((f"{path}[{i}]", record) for i, record in enumerate(value))
        return
    lists = {k: v for k, v in value.items() if _are_records(v)} if isinstance(value, Mapping) else {}
    if _is_row(value) or not isinstance(value, Mapping):
        yield f"{path}:1", value
    elif len(lists) == 1:
        key, records = next(iter(lists.items()))
        yield from ((f"{path}.{key}[{i}]", record) for i, record in enumerate(records))
    elif lists:
        names = ", ".join(map(repr, lists))
        raise UserError(
            f"{path}: one JSON object with several lists of rows ({names}); write the one you mean to a file"
        )
    elif value and all(isinstance(v, Mapping) for v in value.values()):
        yield from ((f"{path}.{key}", record) for key, record in value.items())
    else:
        yield f"{path}:1", value


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        _are_records(value.get(key)) and any({"role", "from"} & turn.keys() for turn in value[key])
        for key in ("messages", "conversations", "prompt")
    )


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _holds_rows(value: Any) -> bool:
    """Whether a line could be the whole file: a list of rows, or an object that holds one."""
    if isinstance(value, list):
        return _are_records(value) and not any({"role", "from"} & one.keys() for one in value)
    return isinstance(value, Mapping) and not _is_row(value) and any(_are_records(v) for v in value.values())
