"""The rows of one evaluation: append-only files that a killed run continues from.

A sample's key ends in a digest of everything that decides it: model, adapter, prompt, settings, and the engine or
endpoint settings of `inference.cache_key`. A judgement is identified by (key, judge). So a row is reused exactly when
it would come out the same, and changing a recipe never mixes old answers with new ones.

Answers that the present recipe does not ask for are moved to `superseded_*.jsonl` at the end, with their judgements.
They come back if a recipe asks for them again. Judgements of one answer by several judges lie beside each other.

What is in memory is which rows there are and what judgements count for (`row_files`). `Stores` holds no more than a
bounded number of folders open.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.io import file_lock
from ema_scale.evaluation.records import JUDGEMENTS_FILE, SAMPLES_FILE, Judgement, Sample
from ema_scale.evaluation.row_files import Judged, Judgements, RowFile, Samples, StoredAnswer

FLUSH_SECONDS = 0.5
MOST_OPEN, MOST_BYTES = 64, 256 << 20  # of stores that are open at once, besides the one in use


class Store:
    """Samples by key and judgements by (key, judge) in one folder, written as they come.

    The rows are looked up when they are first asked for. `close` forgets them; what is asked for later opens the store
    again.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        exclusive: bool = False,
        used: Callable[[Store], None] | None = None,
        lock: threading.RLock | None = None,
    ) -> None:
        """
        Args:
            folder: an evaluation folder.
            exclusive: while the store is open, no other process may open it exclusively.
            used: is called whenever the store is used.
            lock: held while the store works; shared by stores that may close each other.
        """
        self.folder = Path(folder)
        self._files = (
            RowFile(self.folder / SAMPLES_FILE, Sample, repair=exclusive),
            RowFile(self.folder / JUDGEMENTS_FILE, Judgement, repair=exclusive),
        )
        self._exclusive, self._used = exclusive, used
        self._held: contextlib.ExitStack | None = None
        self._numbers: dict[str, int] = {}
        self._samples: Samples | None = None
        self._judgements: Judgements | None = None
        self._new_samples: list[Sample] = []
        self._new_judgements: list[Judgement] = []
        self._flushed = time.monotonic()
        self._lock = lock or threading.RLock()  # samples come from one thread, judgements from others

    def open(self) -> None:
        """Hold the folder. Raises UserError if another evaluation is at work there."""
        with self._lock:
            if self._held is None:
                held = contextlib.ExitStack()
                if self._exclusive:
                    busy = UserError(f"{self.folder}: another evaluation is writing here; wait for it to end")
                    held.enter_context(file_lock(self.folder / ".lock", busy))
                self._held = held
            if self._used is not None:
                self._used(self)

    def close(self) -> None:
        """Bring everything to the disk, forget the rows and let others write. Raises UserError as `flush` does."""
        with self._lock:
            try:
                self.flush()
            finally:
                self._forget()
                if self._held is not None:
                    self._held.close()
                    self._held = None

    def _forget(self) -> None:
        self._samples, self._judgements, self._numbers = None, None, {}
        for file in self._files:
            file.close()

    @property
    def samples(self) -> Samples:
        with self._lock:
            self.open()
            if self._samples is None:
                self.flush()
                self._samples = Samples(self._files[0], self._numbers)
            return self._samples

    @property
    def judgements(self) -> Judgements:
        with self._lock:
            self.open()
            if self._judgements is None:
                self.flush()
                self._judgements = Judgements(self._files[1], self._numbers)
            return self._judgements

    @property
    def judges(self) -> set[str]:
        """The judges of any answer, superseded ones included."""
        return self.judgements.judges

    def judged(self, key: str, judge: str) -> Judged | None:
        """What the judgement of an answer counts for; None if there is none."""
        return self.judgements.judged(key, judge)

    @property
    def present(self) -> Iterator[StoredAnswer]:
        """The samples that were not superseded."""
        self.flush()
        return self.samples.present()

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.size() for file in self._files)

    def add_sample(self, row: Sample) -> None:
        with self._lock:
            self.open()
            self._new_samples.append(row)
            if self._samples is not None:
                self._samples.add(row)
            self._flush_if_due()

    def add_judgement(self, row: Judgement, *, at_once: bool = False) -> None:
        """`at_once`: it was paid for, so it goes to the disk before anything else happens."""
        with self._lock:
            self.open()
            self._new_judgements.append(row)
            if self._judgements is not None:
                self._judgements.add(row)
            self._flush_if_due(at_once)

    def _flush_if_due(self, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk. Raises UserError if it cannot be written."""
        with self._lock:
            samples, judgements = self._files
            if self._new_samples:  # first: a judgement never gets to the disk before its sample
                places = samples.append(self._new_samples)
                if self._samples is not None:
                    self._samples.settle(self._new_samples, places)
                self._new_samples = []
            if self._new_judgements:
                places = judgements.append(self._new_judgements)
                if self._judgements is not None:
                    self._judgements.settle(self._new_judgements, places)
                self._new_judgements = []
            self._flushed = time.monotonic()

    def keep_only(self, samples: Iterable[str]) -> int:
        """Move every other sample, with all its judgements, to `superseded_*`; returns how many samples that were.

        Raises KeyError if a named sample is not there.
        """
        with self._lock:
            self.flush()
            rows, judgements, (sample_file, judgement_file) = self.samples, self.judgements, self._files
            kept = list(dict.fromkeys(samples))
            moved = False
            if not rows.are_all_in_use(kept, len(kept)):
                sample_file.keep_only([rows.place(key) for key in kept], rows.not_among(kept))
                moved = True
            wanted = judgements.of_keys(kept)
            if len(wanted) != judgements.in_use or (wanted and wanted[0] < 0):
                judgement_file.keep_only(wanted, judgements.not_among(kept))
                moved = True
            if moved:
                self._forget()
            return len(rows) - len(kept)


class Stores(Mapping[str, Store]):
    """The stores of many targets by name, which no other evaluation may write to meanwhile. A bounded number is open:
    the least recently used ones are closed.

    Use as a context manager; its end closes all.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._lock = threading.RLock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._stores = {
            name: Store(folder, exclusive=True, used=self._keep_open, lock=self._lock)
            for name, folder in folders.items()
        }
        self._by_folder = {store.folder: store for store in self._stores.values()}

    def __getitem__(self, name: str) -> Store:
        return self._stores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stores)

    def __len__(self) -> int:
        return len(self._stores)

    def _keep_open(self, store: Store) -> None:
        if store.folder in self._open:
            self._open.move_to_end(store.folder)
            return
        self._open[store.folder] = store.size
        while len(self._open) > 1 and (len(self._open) > MOST_OPEN or sum(self._open.values()) > MOST_BYTES):
            self.close(self._by_folder[next(iter(self._open))])

    def close(self, store: Store) -> None:
        """Close one store; it opens again when it is asked for."""
        with self._lock:
            self._open.pop(store.folder, None)
            store.close()

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for folder in list(self._open):
                self.close(self._by_folder[folder])


@contextlib.contextmanager
def locked_store(folder: Path | str) -> Iterator[Store]:
    """The store of a folder that no other evaluation may write to meanwhile; flushed at the end.

    Raises UserError if another evaluation is at work there.
    """
    store = Store(folder, exclusive=True)
    store.open()
    try:
        yield store
    finally:
        store.close()
