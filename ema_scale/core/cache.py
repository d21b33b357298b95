"""What lies in the cache folder, and how it is kept small: everything in it can be made again."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ema_scale.core.errors import UserError

KINDS = {
    "tokens": "rows that runs have tokenized",
    "datasets": "tokenized sets of many rows, which processes share",
    "reference": "hidden states of references",
    "smallworld": "the small world's rows and weights",
    "packaged": "models from packages",
    "logs": "messages of engines",
}
_PLACES = {"tokens": "tokens", "datasets": "tokens/datasets"}


@dataclass(frozen=True)
class CacheEntry:
    """One folder or file of the cache. kind: a key of KINDS; used: when it was last read or written, in seconds."""

    kind: str
    path: Path
    size: int
    used: float

    @property
    def locks(self) -> tuple[Path, ...]:
        """The lock files that its users hold, where they are there."""
        name = self.path.name
        found = (self.path / ".lock", self.path.with_name(f"{name}.lock"), self.path.with_name(f".{name}.lock"))
        above = (self.path.parent.parent / f".{name}.lock",) if self.kind == "datasets" else ()
        return tuple(lock for lock in (*found, *above) if lock.is_file())


def entries(root: Path) -> list[CacheEntry]:
    """Everything in the cache folder `root`, the least recently used first."""
    found = []
    for kind in KINDS:
        folder = root / _PLACES.get(kind, kind)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.endswith(".lock") or (kind == "tokens" and path.name == "datasets"):
                continue
            stats = list(_stats(path))
            used = max((max(s.st_atime, s.st_mtime) for s in stats), default=path.lstat().st_mtime)
            found.append(CacheEntry(kind, path, sum(s.st_size for s in stats), used))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def _stats(path: Path) -> Iterator[os.stat_result]:
    files = [path] if not path.is_dir() else (Path(top) / name for top, _, names in os.walk(path) for name in names)
    for file in files:
        with contextlib.suppress(OSError):  # another process has removed it
            yield file.lstat()


def superfluous(
    found: Iterable[CacheEntry], *, unused_days: float | None = None, most_bytes: int | None = None
) -> list[CacheEntry]:
    """What was not used for `unused_days`, and as much of the least recently used as lies above `most_bytes`."""
    found = sorted(found, key=lambda entry: entry.used)
    total, before = sum(entry.size for entry in found), time.time() - (unused_days or 0) * 86400
    chosen = []
    for entry in found:
        is_old = unused_days is not None and entry.used < before
        if is_old or (most_bytes is not None and total > most_bytes):
            chosen.append(entry)
            total -= entry.size
    return chosen


def remove(chosen: Iterable[CacheEntry]) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove entries that no process holds; returns (removed, in use)."""
    removed, in_use = [], []
    for entry in chosen:
        with contextlib.ExitStack() as held:
            try:
                for lock in entry.locks:
                    held.enter_context(FileLock(lock, timeout=0, thread_local=False))
            except (Timeout, OSError):
                in_use.append(entry)
                continue
            if entry.path.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                entry.path.unlink(missing_ok=True)
            removed.append(entry)
    return removed, in_use


def keep_below(root: Path, kinds: Collection[str], most_bytes: int) -> list[CacheEntry]:
    """Remove what was used least recently, until these kinds take at most `most_bytes`; returns what is gone.

    What was used within a day stays: a training that runs may have mapped it into memory.
    """
    found, before = [entry for entry in entries(root) if entry.kind in kinds], time.time() - 86400
    return remove(entry for entry in superfluous(found, most_bytes=most_bytes) if entry.used < before)[0]


def gigabytes(variable: str, default: float) -> float:
    """The size in an environment variable. Raises UserError for what is no size."""
    text = os.environ.get(variable) or str(default)
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < math.inf:
        raise UserError(f"{variable}: found {text!r}, expected gigabytes, such as {default:g}")
    return found
