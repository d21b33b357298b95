"""The rows of one evaluation: append-only files that a killed run continues from.

A sample's key ends in a digest of everything that decides it: model, adapter, prompt, settings, and the engine or
endpoint settings of `inference.cache_key`. A judgement is identified by (key, judge). So a row is reused exactly when
it would come out the same, and changing a recipe never mixes old answers with new ones.

Answers that the present recipe does not ask for are moved to `superseded_*.jsonl` at the end, with their judgements.
They come back if a recipe asks for them again. Judgements of one answer by several judges lie beside each other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from ema_scale.core.errors import UserError
from ema_scale.core.io import append_jsonl, atomic_write_text, file_lock, jsonl_text
from ema_scale.evaluation.records import JUDGEMENTS_FILE, SAMPLES_FILE, Judgement, Sample

FLUSH_SECONDS = 0.5

Identity = TypeVar("Identity")
RowType = TypeVar("RowType", Sample, Judgement)


class RowTable(Generic[Identity, RowType]):
    """The rows of one file by identity: those in use, and those that were put aside in `superseded_<file>`."""

    def __init__(self, path: Path, kind: type[RowType], identity: Callable[[RowType], Identity]) -> None:
        self.path, self.aside = path, path.with_name(f"superseded_{path.name}")
        self._kind: type[RowType] = kind
        self._identity: Callable[[RowType], Identity] = identity
        superseded, current = kind.read_all(self.aside, repair=True), kind.read_all(path, repair=True)
        self.rows: dict[Identity, RowType] = {identity(row): row for row in superseded + current}
        self.current: list[Identity] = [identity(row) for row in current]
        self._pending: list[RowType] = []

    def add(self, row: RowType) -> None:
        identity = self._identity(row)
        self.rows[identity] = row
        self.current.append(identity)
        self._pending.append(row)

    def flush(self) -> None:
        if self._pending:
            append_jsonl(self.path, (row.to_row() for row in self._pending))
            self._pending = []

    def keep_only(self, wanted: dict[Identity, RowType]) -> None:
        """Put every other row aside, and take the wanted ones back from there."""
        if len(self.current) == len(wanted) and set(self.current) == wanted.keys():
            return
        # The rows to put aside are on the disk before the file they came from shrinks.
        there = {self._identity(row) for row in self._kind.read_all(self.aside, repair=True)}
        rest = [row for identity, row in self.rows.items() if identity not in wanted and identity not in there]
        if rest:
            append_jsonl(self.aside, (row.to_row() for row in rest))
        atomic_write_text(self.path, jsonl_text(row.to_row() for row in wanted.values()))
        self.current = list(wanted)


class Store:
    """Samples by key and judgements by (key, judge) in one folder, written as they come."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._samples = RowTable(self.folder / SAMPLES_FILE, Sample, lambda row: row.key)
        self._judgements = RowTable(self.folder / JUDGEMENTS_FILE, Judgement, lambda row: (row.key, row.judge))
        self.samples: dict[str, Sample] = self._samples.rows
        self.judgements: dict[tuple[str, str], Judgement] = self._judgements.rows
        self.judges: set[str] = {judge for _, judge in self.judgements}
        self._flushed = time.monotonic()
        self._writing = threading.RLock()  # samples come from one thread, judgements from others

    @property
    def present(self) -> list[Sample]:
        """The samples that were not superseded, in the order of the file."""
        return [self.samples[key] for key in dict.fromkeys(self._samples.current)]

    def add_sample(self, row: Sample) -> None:
        with self._writing:
            self._samples.add(row)
            self._flush_if_due()

    def add_judgement(self, row: Judgement, *, at_once: bool = False) -> None:
        """`at_once`: it was paid for, so it goes to the disk before anything else happens."""
        with self._writing:
            self._judgements.add(row)
            self.judges.add(row.judge)
            self._flush_if_due(at_once)

    def _flush_if_due(self, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk. Raises UserError if it cannot be written."""
        with self._writing:
            self._samples.flush()  # first: a judgement never gets to the disk before its sample
            self._judgements.flush()
            self._flushed = time.monotonic()

    def keep_only(self, samples: Iterable[str]) -> int:
        """Move every other sample, with all its judgements, to `superseded_*`; returns how many samples that were.

        Raises KeyError if a named sample is not there.
        """
        self.flush()
        kept = {key: self.samples[key] for key in samples}
        self._samples.keep_only(kept)
        self._judgements.keep_only({pair: row for pair, row in self.judgements.items() if pair[0] in kept})
        return len(self.samples) - len(kept)


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
