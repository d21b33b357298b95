"""The rows of one evaluation: append-only files that a killed run continues from.

A sample's key ends in a digest of everything that decides it (model, adapter, prompt, settings, and what of the
engine or endpoint decides, see `deciding`); a judgement's identity is (key, judge). So a row is reused exactly when it
would come out the same, and changing a recipe never mixes old answers with new ones. Answers that the present recipe
does not ask for are moved to `superseded_*.jsonl` at the end with their judgements, from where they come back if it
asks for them again. The judgements of an answer by other judges stay beside each other.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.io import append_jsonl, atomic_write_text, file_lock, read_jsonl

SAMPLES, JUDGEMENTS = "samples.jsonl", "judgements.jsonl"


FLUSH_SECONDS = 0.5


StoredRow = dict[str, Any]


class Store:
    """Samples by key and judgements by (key, judge) in one folder, written as they come."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._current: dict[str, list[Any]] = {SAMPLES: [], JUDGEMENTS: []}
        self.samples: dict[str, StoredRow] = self._read(SAMPLES)
        self.judgements: dict[tuple[str, str], StoredRow] = self._read(JUDGEMENTS)
        self._pending: dict[str, list[StoredRow]] = {SAMPLES: [], JUDGEMENTS: []}
        self.judges: set[str] = {judge for _, judge in self.judgements}
        self._flushed = time.monotonic()
        self._writing = threading.RLock()  # samples come from one thread, judgements from others

    def _read(self, name: str) -> dict[Any, StoredRow]:
        aside = read_jsonl(self.folder / f"superseded_{name}", repair=True)
        current = read_jsonl(self.folder / name, repair=True)
        self._current[name] = [_identity(name, row) for row in current]
        return {_identity(name, row): row for row in aside + current}

    @property
    def present(self) -> list[StoredRow]:
        """The samples that were not superseded, in the order of the file."""
        return [self.samples[key] for key in dict.fromkeys(self._current[SAMPLES])]

    def add_sample(self, row: StoredRow) -> None:
        self.samples[row["key"]] = row
        self._append(SAMPLES, row)

    def add_judgement(self, row: StoredRow, *, at_once: bool = False) -> None:
        """`at_once`: it was paid for, so it goes to the disk before anything else happens."""
        self.judgements[row["key"], row["judge"]] = row
        self.judges.add(row["judge"])
        self._append(JUDGEMENTS, row, at_once)

    def _append(self, name: str, row: StoredRow, at_once: bool = False) -> None:
        with self._writing:
            self._pending[name].append(row)
            self._current[name].append(_identity(name, row))
            if at_once or time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Bring everything to the disk. Raises UserError if it cannot be written."""
        with self._writing:
            for name in (SAMPLES, JUDGEMENTS):  # a judgement never gets to the disk before its sample
                rows = self._pending[name]
                if rows:
                    try:
                        append_jsonl(self.folder / name, rows)
                    except OSError as error:
                        raise UserError(f"{self.folder / name}: cannot write ({error.strerror})") from None
                    self._pending[name] = []
            self._flushed = time.monotonic()

    def keep_only(self, samples: Iterable[str]) -> int:
        """Move every other sample, with all its judgements, to `superseded_*`; returns how many samples that were.

        Raises KeyError if a named sample is not there.
        """
        self.flush()
        kept = {key: self.samples[key] for key in samples}
        self._split(SAMPLES, kept, self.samples)
        judged = {pair: row for pair, row in self.judgements.items() if pair[0] in kept}
        self._split(JUDGEMENTS, judged, self.judgements)
        return len(self.samples) - len(kept)

    def _split(self, name: str, wanted: dict[Any, StoredRow], everything: dict[Any, StoredRow]) -> None:
        current = self._current[name]
        if len(current) == len(wanted) and set(current) == wanted.keys():
            return
        # The rows to put aside are on the disk before the file they came from shrinks.
        aside = self.folder / f"superseded_{name}"
        there = {_identity(name, row) for row in read_jsonl(aside, repair=True)}
        rest = [r for key, r in everything.items() if key not in wanted and key not in there]
        if rest:
            append_jsonl(aside, rest)
        atomic_write_text(self.folder / name, _lines(wanted.values()))
        self._current[name] = list(wanted)


@contextlib.contextmanager
def locked_store(folder: Path | str) -> Iterator[Store]:
    """The store of a folder that no other evaluation may write to meanwhile; flushed at the end.

    Raises UserError if another evaluation is at work there.
    """
    busy = UserError(f"{folder}: another evaluation is writing here; wait for it to end")
    with file_lock(Path(folder) / ".lock", busy):
        store = Store(folder)
        try:
            yield store
        finally:
            store.flush()


def _identity(name: str, row: StoredRow) -> Any:
    return row["key"] if name == SAMPLES else (row["key"], row["judge"])


def _lines(rows: Iterable[StoredRow]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
