"""Conversations tokenized by several processes: rendering and masks are Python's work, one core's in one process."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ema_scale.core.devices import free_cores
from ema_scale.core.errors import UserError

if TYPE_CHECKING:
    from ema_scale.data.encoded import Encoded
    from ema_scale.data.formats import Message

log = logging.getLogger(__name__)

Conversation = tuple["Sequence[Message]", "Sequence[Mapping[str, Any]]"]
Encode = Callable[[Sequence[Conversation]], "Iterator[Encoded | UserError]"]
LEAST_ROWS = 4096  # fewer are done before another process has started
_PIECE = 512


class TokenWorkers:
    """Processes that encode as `encode` does, started when there is enough to do. Use as a context manager.

    They are started with `python -m`, not forked: this process may have threads and a GPU.

    Args:
        encode: encodes conversations here, in order.
        settings: what `token_worker` encodes with: a tokenizer, and what `Encoder` and its `encode_all` take.
        processes: how many; default: one per core that this process may use.
    """

    def __init__(self, encode: Encode, settings: tuple[Any, ...], *, processes: int | None = None) -> None:
        self._encode, self._settings = encode, settings
        self._processes = free_cores() if processes is None else processes
        self._started: list[subprocess.Popen[bytes]] = []
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._ended, self._here = set[subprocess.Popen[bytes]](), threading.Lock()

    def encode_all(self, conversations: Sequence[Conversation]) -> Iterator[Encoded | UserError]:
        """What `encode` gives, in order."""
        pieces = [conversations[start : start + _PIECE] for start in range(0, len(conversations), _PIECE)]
        if self._processes < 2 or len(conversations) < LEAST_ROWS or not self._start():
            yield from self._encode(conversations)
            return
        with ThreadPoolExecutor(len(self._started)) as pool:
            for found in pool.map(self._ask, pieces):
                yield from found

    def _start(self) -> bool:
        if self._started:
            return True
        try:
            asked = pickle.dumps(self._settings)
        except Exception as error:  # a tokenizer of other people's code
            log.info("tokenizing in one process: the tokenizer cannot be copied to others (%s)", error)
            self._processes = 1
            return False
        path = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        for _ in range(self._processes):
            worker = subprocess.Popen(
                [sys.executable, "-m", "ema_scale.data.token_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                start_new_session=True,  # Ctrl-C is this process's to handle; workers end when it does
            )  # fmt: skip
            self._started.append(worker)
            self._free.put(worker)
            _send(worker, asked)
        log.info("tokenizing in %d processes", self._processes)
        return True

    def _ask(self, piece: Sequence[Conversation]) -> list[Encoded | UserError]:
        worker = self._free.get()
        try:
            _send(worker, pickle.dumps(piece))
            assert worker.stdout is not None
            found: list[Encoded | UserError] = pickle.load(worker.stdout)
            return found
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            worker.kill()  # it may be out of step
            with self._here:
                if worker not in self._ended:
                    self._ended.add(worker)
                    why = error or "without a word"
                    log.warning("a tokenizing process has ended (%s); its rows are tokenized here", why)
                return list(self._encode(piece))
        finally:
            self._free.put(worker)

    def __enter__(self) -> TokenWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._started:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was not sent cannot be any more
                        pipe.close()
        self._started = []


def _send(worker: subprocess.Popen[bytes], data: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(data)
    worker.stdin.flush()
