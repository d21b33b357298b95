"""A word for every wait: what takes longer than ten seconds says what it waits for."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
FIRST_WORD, MOST_BETWEEN = 10.0, 300.0  # seconds


@contextlib.contextmanager
def waiting(what: str, say: Callable[..., object] = log.info) -> Iterator[None]:
    """Log `waiting for WHAT` if the block takes over ten seconds, and again each time its duration has doubled, at
    least every five minutes. say: takes a format and its values, as `log.info` does."""
    ended = threading.Event()

    def watch() -> None:
        began, pause = time.monotonic(), FIRST_WORD
        while not ended.wait(pause):
            say("waiting for %s (%.0f s)", what, time.monotonic() - began)
            pause = min(time.monotonic() - began, MOST_BETWEEN)

    watcher = threading.Thread(target=watch, daemon=True, name="waiting")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
