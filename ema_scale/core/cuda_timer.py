"""Time parts of a step, on a GPU without making the host wait."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds spent inside `running`; `take` returns the sum and resets it.

    On CUDA the seconds are those between events on the current stream.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[Any, Any]] = deque()

    @contextlib.contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            began = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - began
            return
        while self._events and self._events[0][1].query():
            self._add(*self._events.popleft())
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        try:
            yield
        finally:
            pair[1].record()
            self._events.append(pair)

    def take(self) -> float:
        """Seconds since the last `take`; waits for what is still running on the GPU."""
        while self._events:
            first, last = self._events.popleft()
            last.synchronize()
            self._add(first, last)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add(self, first: Any, last: Any) -> None:
        self._seconds += first.elapsed_time(last) / 1000
