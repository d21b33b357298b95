"""What is printed for people. Names, answers and logs of others are shown, and never steer the terminal."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from rich.console import Console

from ema_scale.core.errors import UserError
from ema_scale.core.text import printable

_CHATTY = ("httpx", "httpx2", "datasets", "vllm", "transformers", "deepspeed", "filelock", "matplotlib")


class PlainConsole(Console):
    """Prints texts as they are: no markup, no emoji codes, and what does not print as an escape."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)


def say(text: str, *, flush: bool = False) -> None:
    """Print a text that may hold what others wrote."""
    print(printable(text), flush=flush)


def complain(message: object) -> None:
    """Print an error, which may hold what others wrote, as the last word of a command."""
    print(f"ema: {printable(str(message))}", file=sys.stderr)


class _Printable(logging.Formatter):
    """Log lines name rows, files and answers of others: what would steer the terminal is shown as an escape."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def start_logging() -> None:
    """Log to standard error, from the level of EMA_LOG on. Raises UserError for a level that does not exist."""
    level = os.environ.get("EMA_LOG") or "INFO"
    if level.upper() not in logging.getLevelNamesMapping():
        raise UserError(f"EMA_LOG: found {level!r}, expected DEBUG, INFO, WARNING or ERROR")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it warns wherever there is no GPU
