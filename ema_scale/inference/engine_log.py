"""An engine's own messages go to a file: they are for its developers, and would bury what the user wants to read."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ema_scale.core.io import open_append


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[Callable[..., object]]:
    """Append to `path` what this process prints meanwhile, and what children that it starts print all their life.

    Yields a function that still speaks to the user; it takes a format and its values.

    This is below Python (file descriptors 1 and 2), for engines also print from compiled code. Raises CannotWrite if
    the file cannot be written.
    """
    with open_append(path) as opened:
        file = os.dup(opened.fileno())
    _flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    try:
        for number in saved:
            os.dup2(file, number)
        yield lambda text, *values: os.write(saved[2], f"{text % values}\n".encode())
    finally:
        _flush()
        for number, original in saved.items():
            os.dup2(original, number)
            os.close(original)
        os.close(file)


@contextlib.contextmanager
def logger_to(name: str, path: Path) -> Iterator[None]:
    """Append to `path` what the logger `name` and those below it say, and show it nowhere else."""
    logger = logging.getLogger(name)
    handlers, propagate = logger.handlers[:], logger.propagate
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        handler.close()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
