"""Fill the cache of reference states: one pass over the rows, shared among the processes.

It can be killed at any time: what was written counts, and the next run computes the rest. If several runs need the same
states at the same time, one fills the cache and the others wait.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ema_scale.core.batching import batch_by_length
from ema_scale.core.collectives import any_rank, broadcast_from_main, is_first_rank, world_size
from ema_scale.core.disk import make_folder
from ema_scale.core.errors import UserError
from ema_scale.core.io import temporary_beside
from ema_scale.core.progress import Progress
from ema_scale.core.text import format_bytes
from ema_scale.reference.cached import Cached
from ema_scale.reference.hidden_state_store import HiddenStateStore, row_key

log = logging.getLogger(__name__)

SHARD_BYTES = 2**28
SHARD_SECONDS = 60.0  # the work that a kill may cost
SEEN_SECONDS = 60.0  # how long NFS may keep an old listing of a folder

FillRun = Callable[[list[list[int]]], dict[str, Tensor]]


@dataclass(frozen=True)
class FillStats:
    """What `fill_store` did: its folder, rows and tokens computed now, bytes written, seconds."""

    folder: Path
    rows: int
    tokens: int
    bytes: int
    seconds: float


def fill_store(
    cached: Cached,
    rows: Sequence[Sequence[int]],
    run: FillRun,
    accelerator: Any,
    *,
    tokens_per_batch: int,
    stop: Callable[[], bool] = lambda: False,
) -> FillStats:
    """Compute the states of `rows` (token ids) that the cache does not have. A collective.

    run: one batch of rows -> kind -> states [B, T, H], row i in the first len(row) positions. Under ZeRO-3 it is a
        collective, so every process calls it equally often.
    tokens_per_batch: at most so many tokens, padding included, but at least one row.
    stop: whether this process was asked to stop. Called between batches, and while another run is waited for.

    Raises UserError, before anything is written, if the disk is too small; KeyboardInterrupt, on all processes, if
    `stop` is true on any. The states computed so far are on disk then.
    """
    began = time.monotonic()
    keyed = {row_key(row): list(row) for row in rows}
    keys = list(keyed)
    main, world = accelerator.is_main_process, accelerator.num_processes
    written, stopped = 0, False
    with _exclusive(cached.folder, main, stop):
        if main:
            for store in cached.stores.values():
                store.clean(keys)
        accelerator.wait_for_everyone()
        for store in cached.stores.values():
            store.load()
        # The main process decides: another one that sees less of the folder would run more batches, and wait forever.
        missing = broadcast_from_main(sorted(cached.missing(keys), key=lambda key: (-len(keyed[key]), key)))
        tokens = sum(len(keyed[key]) for key in missing)
        batches = batch_by_length(missing, lambda key: len(keyed[key]), tokens_per_batch)
        shown = main and bool(missing)
        progress = Progress("tokens of the reference", tokens, unit="token", shown=shown)
        with progress, _Writers(cached) as writers:
            for first in range(0, len(batches), world):
                index = first + accelerator.process_index
                # A process without a batch of its own repeats one: a sharded forward needs all processes.
                batch = batches[index] if index < len(batches) else batches[0]
                states = run([keyed[key] for key in batch])
                if first == 0:  # now the bytes per token are known, which depend on autocast's dtype
                    written = tokens * sum(s.shape[-1] * s.element_size() for s in states.values())
                    _check_space(cached.folder, written)
                    if main:
                        log.info(
                            "the reference of %d rows is computed once (%s): %s", len(missing), format_bytes(written),
                            cached.folder,
                        )  # fmt: skip
                if index < len(batches):
                    writers.add({key: len(keyed[key]) for key in batch}, states)
                progress.add(sum(len(keyed[key]) for group in batches[first : first + world] for key in group))
                if stopped := any_rank(stop()):
                    break
        accelerator.wait_for_everyone()
    if stopped:
        raise KeyboardInterrupt
    _wait_until_seen(cached, keys)
    return FillStats(cached.folder, len(missing), tokens, written, time.monotonic() - began)


def unusable(folder: Path) -> str | None:
    """Why a folder cannot hold a cache for all processes of this run, as a clause; None if it can. A collective."""
    name, text, problem = "", uuid.uuid4().hex, None
    if is_first_rank():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark = temporary_beside(folder / "seen")
            mark.write_text(text)
            name = mark.name
        except OSError as error:
            problem = f"EMA_CACHE ({folder}) cannot be written: {error.strerror}"
    name, text, problem = broadcast_from_main((name, text, problem))
    if problem:
        return problem
    mark = folder / name  # each process looks into its own folder
    if any_rank(not any(_reads(mark, text, wait) for wait in (0.0, 0.5, 1.5))):
        problem = f"EMA_CACHE ({folder}) is not a folder that all processes share"
    if is_first_rank():
        mark.unlink(missing_ok=True)
    return problem


def _reads(path: Path, text: str, wait: float) -> bool:
    time.sleep(wait)
    try:
        return path.read_text() == text
    except OSError:
        return False


def _wait_until_seen(cached: Cached, keys: Sequence[str]) -> None:
    """Wait until a network file system shows what other nodes wrote. A collective."""
    until = time.monotonic() + SEEN_SECONDS * (world_size() > 1)
    while True:
        for store in cached.stores.values():
            store.load()
        if not any_rank(bool(cached.missing(keys))):
            return
        if broadcast_from_main(time.monotonic() >= until):
            raise UserError(
                f"{cached.folder}: some rows are missing; EMA_CACHE must name a folder that all processes share"
            )
        time.sleep(2)


@dataclass
class _Writers:
    """Collects rows until they make a shard. On exit the rest is written, also after an error or an interrupt."""

    cached: Cached
    pending: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bytes: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, lengths: dict[str, int], states: dict[str, Tensor]) -> None:
        for kind, batch in states.items():
            store: HiddenStateStore = self.cached.stores[kind]
            whole = batch.cpu()
            for index, (key, length) in enumerate(lengths.items()):
                if key not in store:
                    tensor = whole[index, :length].clone()
                    self.pending.setdefault(kind, {})[key] = tensor
                    self.bytes += tensor.nbytes
        if self.bytes >= SHARD_BYTES or time.monotonic() - self.since >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        for kind, states in self.pending.items():
            self.cached.stores[kind].add(states)
        self.pending, self.bytes, self.since = {}, 0, time.monotonic()

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(existing).free


def _check_space(folder: Path, needed: int) -> None:
    free = broadcast_from_main(free_bytes(folder))
    if needed >= free:
        raise UserError(
            f"{folder}: the reference of these rows takes {format_bytes(needed)}, and the disk has "
            f"{format_bytes(free)} free; set "
            "EMA_CACHE to a larger disk, or use reference: adapter_off (two_stream under ZeRO-3)"
        )


@contextlib.contextmanager
def _exclusive(folder: Path, main: bool, stop: Callable[[], bool]) -> Iterator[None]:
    """Only one run at a time is inside. The others wait, and log it, in steps shorter than the time-out of a
    collective. Raises KeyboardInterrupt while it waits, if `stop` is true on any process."""
    lock = FileLock(make_folder(folder) / ".lock")
    waiting = False
    while True:
        held = False
        if main:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=5 if waiting else 1)
                held = True
        if broadcast_from_main(held):
            break
        if any_rank(stop()):
            raise KeyboardInterrupt
        if main and not waiting:
            log.info("%s: another run is filling it; waiting", folder)
        waiting = True
    try:
        yield
    finally:
        lock.release()
