"""What a run leaves behind: atomic writes, append-only rows, provenance, status, one writer at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Atomic JSON, indented, with a final newline. NaN is refused: it is not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def jsonl_text(rows: Iterable[dict[str, Any]]) -> str:
    """One JSON object per line. NaN is refused: it is not JSON."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def append_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows and flush them to the disk before returning."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(jsonl_text(rows))
        handle.flush()
        os.fsync(handle.fileno())


def read_lines(path: Path | str, *, repair: bool = False) -> list[bytes]:
    """The whole lines of an append-only file, without their newlines; [] if it does not exist.

    A last line without a newline was cut by a kill: it is left out, and with `repair` also cut off the file.
    """
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) != len(data):
        os.truncate(path, len(whole))
    return whole.splitlines()


def read_jsonl(path: Path | str, *, repair: bool = False) -> list[dict[str, Any]]:
    """Rows of an append-only file, read as `read_lines` does.

    Raises UserError, naming the line, if any whole line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(read_lines(path, repair=repair), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); expected one JSON object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: found {type(row).__name__}, expected a JSON object")
        rows.append(row)
    return rows
