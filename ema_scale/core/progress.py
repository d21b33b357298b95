"""Progress of long work: a bar on a terminal, elsewhere a log line every 15 seconds."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts `total` pieces of work from `done` on. Use as a context manager."""

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "answer") -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self._start, self._first = time.monotonic(), done
        self._last_line = self._start
        self._bar = tqdm(desc=label, total=total, initial=done, unit=unit, disable=not sys.stderr.isatty(), leave=False)

    def add(self, n: int = 1) -> None:
        self.done += n
        self._bar.update(n)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            log.info("%s: %d of %d (%.1f/s)", self.label, self.done, self.total, self.speed)

    @property
    def speed(self) -> float:
        """Pieces per second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self.done > self._first:
            log.info("%s: %d of %d (%.1f/s)", self.label, self.done, self.total, self.speed)
