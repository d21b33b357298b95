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
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ema_scale.core.disk import CannotWrite, make_folder, refuse_special, writing
from ema_scale.core.errors import UserError
from ema_scale.core.files import MissingFile, open_file, parse_json, read_json
from ema_scale.core.waiting import waiting

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_STALE_SECONDS = 86400.0


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to. It takes the place of `path` when the block ends well.

    A reader sees the old content or the new one, never a part. A folder replaces only an empty or missing one. What
    killed processes have left of earlier attempts is removed.

    Raises CannotWrite for what the disk refuses, and if a device, a pipe or a symbolic link is in the place of `path`.
    """
    path = Path(path)
    with writing(path):
        refuse_special(path)
        make_folder(path.parent)
        temporary = temporary_beside(path)
        try:
            yield temporary
            if temporary.is_file():
                with open(temporary, "rb+") as handle:
                    os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                _remove(temporary)


def temporary_beside(path: Path) -> Path:
    """Where this process may write what is to become `path`, or what only it needs for a moment.

    What other processes left there is removed: those of this machine that are gone, and of other machines after a day.
    """
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
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")


def made_before(out: Path, record: str, made_from: Mapping[str, Any] | None, taken: UserError) -> dict[str, Any] | None:
    """The JSON file `record` in the folder `out`, which says what the folder was made from; None if `out` is not there
    or is empty.

    Raises `taken` if `out` holds anything else, or was not made from `made_from`, where that is given.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    found: dict[str, Any] = read_json(out / record) if (out / record).is_file() else {}
    if not found or (made_from is not None and any(found.get(key) != value for key, value in made_from.items())):
        raise taken
    return found


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data`; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path | str, text: str, *, private: bool = False) -> None:
    """Write `text` as UTF-8, half a character as U+FFFD; see `atomic_path`. private: only its owner can read it."""
    with atomic_path(path) as temporary:
        if private:
            temporary.touch(mode=0o600)
        temporary.write_bytes(whole_characters(text).encode("utf-8"))


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Atomic JSON, indented, with a final newline. NaN is refused: it is not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def jsonl_text(rows: Iterable[dict[str, Any]]) -> str:
    """One JSON object per line. NaN is refused: it is not JSON. Half a character becomes U+FFFD."""
    return whole_characters("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def whole_characters(text: str) -> str:
    """The same text with U+FFFD for each half of a character (a lone surrogate), which no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def append_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows and flush them to the disk before returning, as `append_lines` does."""
    append_lines(path, [jsonl_text(rows).encode()])


def append_lines(path: Path | str, lines: Iterable[bytes]) -> int:
    """Append lines with their newlines, and flush them to the disk: all of them or none.

    A last line that a kill has cut off makes way: readers leave it out, and what follows must not be joined to it.
    Returns the offset of the first. Raises CannotWrite for what the disk refuses, and if `path` is no regular file.
    """
    with open_append(path) as handle:
        size: int = handle.seek(0, os.SEEK_END)
        if (whole := _end_of_lines(handle.fileno(), size)) != size:
            os.ftruncate(handle.fileno(), whole)
            size = whole
        try:
            for line in lines:
                view = memoryview(line)
                while view:
                    view = view[handle.write(view) :]
            os.fsync(handle.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # half a row would spoil the next one
                os.ftruncate(handle.fileno(), size)
            raise
    return size


def _end_of_lines(descriptor: int, size: int) -> int:
    """The offset behind the last newline in the first `size` bytes."""
    while size:
        start = max(0, size - 65536)
        if found := os.pread(descriptor, size - start, start).rfind(b"\n") + 1:
            return start + found
        size = start
    return 0


@contextlib.contextmanager
def open_append(path: Path | str) -> Iterator[Any]:
    """A regular file, open to append bytes without a buffer. Raises CannotWrite for what the disk refuses, and for a
    device, a pipe or a symbolic link."""
    path = Path(path)
    with writing(path):
        refuse_special(path)
        make_folder(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "ab+", buffering=0) as handle:
            if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
                raise CannotWrite(f"{path}: no regular file")
            yield handle


def scan_lines(path: Path | str, *, repair: bool = False) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the whole lines of an append-only file; none if it does not exist.

    A kill may cut the last line. Such a line, without a newline, is left out; `repair` also cuts it off the file.
    Raises UserError for what is no regular file.
    """
    try:
        handle = open_file(path)
    except MissingFile:
        return
    offset = 0
    with handle:
        for line in handle:
            if not line.endswith(b"\n"):
                if repair:
                    with writing(path):
                        os.truncate(path, offset)
                return
            yield offset, line
            offset += len(line)


def read_jsonl(path: Path | str, *, repair: bool = False) -> list[dict[str, Any]]:
    """Rows of an append-only file, read as `scan_lines` does.

    Raises UserError, naming the line, if any whole line is not a JSON object.
    """
    rows = []
    for number, (_, line) in enumerate(scan_lines(path, repair=repair), start=1):
        row = parse_json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: found {type(row).__name__}, expected a JSON object")
        rows.append(row)
    return rows


@contextlib.contextmanager
def file_lock(path: Path | str, busy: UserError, timeout: float = 0.0, what: str = "") -> Iterator[None]:
    """Hold the lock file `path` for this process, whichever of its threads ends the block.

    Raises `busy` if another process still holds it after `timeout` seconds. what: is waited for, in the log's words.
    """
    path = Path(path)
    with writing(path):
        refuse_special(path)
        make_folder(path.parent)
        lock = FileLock(path, thread_local=False)
        try:
            with waiting(what or f"another process to release {path}") if timeout else contextlib.nullcontext():
                lock.acquire(timeout=timeout)
        except Timeout:
            raise busy from None
    try:
        yield
    finally:
        lock.release()
