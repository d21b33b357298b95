"""Progress of long work: a bar on a terminal, elsewhere a log line every 15 seconds."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts `total` pieces of work from `done` on. Use as a context manager. shown: whether to say anything."""

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "answer", *, shown: bool = True) -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self._shown, self._lines = shown, shown and not sys.stderr.isatty()
        self._start, self._first = time.monotonic(), done
        self._last_line = self._start
        hidden = self._lines or not shown
        self._bar = tqdm(desc=label, total=total, initial=done, unit=unit, disable=hidden, leave=False)

    def add(self, n: int = 1) -> None:
        self.done += n
        self._bar.update(n)
        now = time.monotonic()
        if self._lines and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            log.info("%s: %d of %d (%.1f/s)", self.label, self.done, self.total, self.speed)

    def at(self, done: int, total: int) -> None:
        """For work that tells how far it is."""
        self.total = self._bar.total = total
        self.add(done - self.done)

    @property
    def speed(self) -> float:
        """Pieces per second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._shown and self.done > self._first:
            log.info("%s: %d of %d (%.1f/s)", self.label, self.done, self.total, self.speed)
