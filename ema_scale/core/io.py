"""Files that survive a kill: atomic writes, append-only rows, locks."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ema_scale.core.errors import UserError
from ema_scale.core.files import parse_json
from ema_scale.core.waiting import waiting

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_STALE_SECONDS = 86400.0


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to. It takes the place of `path` when the block ends well.

    A reader sees the old content or the new one, never a part. A folder replaces only an empty or missing one. What
    killed processes have left of earlier attempts is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
    _remove_leftovers(path)
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove_leftovers(path: Path) -> None:
    """Temporary files for `path` of processes of this machine that are gone, and of other machines after a day."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        named = re.fullmatch(r"([0-9a-f]{6})-(\d+)", found.name[len(path.name) + 2 : -len(".tmp")])
        if named is None:
            continue
        with contextlib.suppress(OSError):  # another process removes it as well
            here, number = named[1] == _HOST, int(named[2])
            if (here and (number == os.getpid() or not _lives(number))) or (
                not here and time.time() - found.stat().st_mtime > _STALE_SECONDS
            ):
                _remove(found)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data`; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8; see `atomic_path`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Atomic JSON, indented, with a final newline. NaN is refused: it is not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def jsonl_text(rows: Iterable[dict[str, Any]]) -> str:
    """One JSON object per line. NaN is refused: it is not JSON. Half a character becomes U+FFFD."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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

    A kill may cut the last line. Such a line, without a newline, is left out; `repair` also cuts it off the file.
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
        row = parse_json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: found {type(row).__name__}, expected a JSON object")
        rows.append(row)
    return rows


@contextlib.contextmanager
def file_lock(path: Path | str, busy: UserError, timeout: float = 0.0, what: str = "") -> Iterator[None]:
    """Hold the lock file `path` for this process.

    Raises `busy` if another process still holds it after `timeout` seconds. what: is waited for, in the log's words.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        with waiting(what or f"another process to release {path}") if timeout else contextlib.nullcontext():
            lock.acquire(timeout=timeout)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.release()
