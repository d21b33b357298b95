"""Filling the cache of reference states: one streaming pass over the rows, every process its part.

It can be killed at any time: what was written counts, and the next run computes the rest. Runs that want the same
states at the same time wait for the one that fills.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from ema_scale.core.batching import batch_by_length
from ema_scale.core.collectives import any_rank, broadcast_from_main, is_first_rank, world_size
from ema_scale.core.errors import UserError
from ema_scale.core.text import format_bytes
from ema_scale.reference.cached import Cached
from ema_scale.reference.hidden_state_store import HiddenStateStore, row_key

log = logging.getLogger(__name__)


SHARD_BYTES = 2**28


SHARD_SECONDS = 60.0  # of work that a kill may cost


SEEN_SECONDS = 60.0  # that NFS may keep an old listing of a folder


FillRun = Callable[[list[list[int]]], dict[str, Tensor]]


@dataclass(frozen=True)
class FillStats:
    """What a filling did: where, rows and tokens computed now, bytes written, seconds."""

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
    tokens_a_batch: int,
    stop: Callable[[], bool] = lambda: False,
) -> FillStats:
    """Compute what the cache lacks of `rows` (token ids). A collective.

    run: one batch of rows -> kind -> states [B, T, H], row i in the first len(row) positions; under ZeRO-3 a
    collective, so every process calls it equally often. tokens_a_batch: with padding; at least one row is run. stop:
    whether this process was told to; asked between batches and while another run is waited for.

    Raises UserError, before anything is written, if the disk is too small; KeyboardInterrupt, on all processes alike,
    after `stop` on any, with what was computed kept.
    """
    began = time.monotonic()
    keyed = {row_key(row): list(row) for row in rows}
    keys = list(keyed)
    main, world = accelerator.is_main_process, accelerator.num_processes
    written, stopped = 0, False
    with _turn(cached.folder, main, stop):
        if main:
            for shelf in cached.shelves.values():
                shelf.clean(keys)
        accelerator.wait_for_everyone()
        for shelf in cached.shelves.values():
            shelf.load()
        # Of the main process: where the others see less of the folder they would run more batches, and wait for it.
        missing = broadcast_from_main(sorted(cached.missing(keys), key=lambda key: (-len(keyed[key]), key)))
        tokens = sum(len(keyed[key]) for key in missing)
        batches = batch_by_length(missing, lambda key: len(keyed[key]), tokens_a_batch)
        with _bar(tokens, main and bool(missing)) as bar, _Writers(cached) as writers:
            for first in range(0, len(batches), world):
                mine = first + accelerator.process_index
                # A process without a batch of its own repeats one: a sharded forward needs all of them.
                batch = batches[mine] if mine < len(batches) else batches[0]
                states = run([keyed[key] for key in batch])
                if first == 0:  # what a token takes is known now: autocast decides on the dtype, too
                    written = tokens * sum(s.shape[-1] * s.element_size() for s in states.values())
                    _check_space(cached.folder, written)
                    if main:
                        log.info(
                            "the reference of %d rows is computed once (%s): %s", len(missing), format_bytes(written),
                            cached.folder,
                        )  # fmt: skip
                if mine < len(batches):
                    writers.add({key: len(keyed[key]) for key in batch}, states)
                bar.update(sum(len(keyed[key]) for group in batches[first : first + world] for key in group))
                if stopped := any_rank(stop()):
                    break
        accelerator.wait_for_everyone()
    if stopped:
        raise KeyboardInterrupt
    _wait_until_seen(cached, keys)
    return FillStats(cached.folder, len(missing), tokens, written, time.monotonic() - began)


def unusable(folder: Path) -> str | None:
    """Why a folder cannot hold a cache for all processes of this run, as a clause; None if it can. A collective."""
    mark, problem = folder / f".seen-{broadcast_from_main(uuid.uuid4().hex)}", None
    if is_first_rank():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            problem = f"EMA_CACHE ({folder}) cannot be written: {error.strerror}"
    if problem := broadcast_from_main(problem):
        return problem
    if any_rank(not any(_exists(mark, wait) for wait in (0.0, 0.5, 1.5))):
        problem = f"EMA_CACHE ({folder}) is not a folder that all processes share"
    if is_first_rank():
        mark.unlink(missing_ok=True)
    return problem


def _exists(path: Path, wait: float) -> bool:
    time.sleep(wait)
    return path.exists()


def _wait_until_seen(cached: Cached, keys: Sequence[str]) -> None:
    """A network file system may show what another node wrote only later. A collective."""
    until = time.monotonic() + SEEN_SECONDS * (world_size() > 1)
    while True:
        for shelf in cached.shelves.values():
            shelf.load()
        if not any_rank(bool(cached.missing(keys))):
            return
        if broadcast_from_main(time.monotonic() >= until):
            raise UserError(
                f"{cached.folder}: not all rows are there; EMA_CACHE must name a folder all processes share"
            )
        time.sleep(2)


@dataclass
class _Writers:
    """Rows collected until they make a shard; the rest is written on leaving, after an error or a kill, too."""

    cached: Cached
    held: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bytes: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, lengths: dict[str, int], states: dict[str, Tensor]) -> None:
        for kind, batch in states.items():
            shelf: HiddenStateStore = self.cached.shelves[kind]
            whole = batch.cpu()
            for index, (key, length) in enumerate(lengths.items()):
                if key not in shelf:
                    tensor = whole[index, :length].clone()
                    self.held.setdefault(kind, {})[key] = tensor
                    self.bytes += tensor.nbytes
        if self.bytes >= SHARD_BYTES or time.monotonic() - self.since >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        for kind, states in self.held.items():
            self.cached.shelves[kind].add(states)
        self.held, self.bytes, self.since = {}, 0, time.monotonic()

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()


def free_bytes(folder: Path) -> int:
    """Free space of the disk that `folder` is or will be on."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(there).free


def _check_space(folder: Path, needed: int) -> None:
    free = broadcast_from_main(free_bytes(folder))
    if needed >= free:
        raise UserError(
            f"{folder}: the reference of these rows takes {format_bytes(needed)}, and the disk has "
            f"{format_bytes(free)} free; set "
            "EMA_CACHE to a larger disk, or use reference: adapter_off (two_stream under ZeRO-3)"
        )


@contextlib.contextmanager
def _turn(folder: Path, main: bool, stop: Callable[[], bool]) -> Iterator[None]:
    """Held by the processes of one run at a time. Waiting is told about, in steps shorter than the time-out of a
    collective, and ends by KeyboardInterrupt if `stop` says so on any process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    told = False
    while True:
        held = False
        if main:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=5 if told else 1)
                held = True
        if broadcast_from_main(held):
            break
        if any_rank(stop()):
            raise KeyboardInterrupt
        if main and not told:
            log.info("%s: another run is filling it; waiting", folder)
        told = True
    try:
        yield
    finally:
        lock.release()


def _bar(tokens: int, main: bool) -> tqdm[Any]:
    every = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(total=tokens, desc="reference", unit="token", unit_scale=True, mininterval=every, disable=not main)
