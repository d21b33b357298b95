"""What is printed for people. Names, answers and logs of others are shown, and never steer the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ema_scale.core.text import printable


class PlainConsole(Console):
    """Prints texts as they are: no markup, no emoji codes, and what does not print as an escape."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)


def say(text: str, *, flush: bool = False) -> None:
    """Print a text that may hold what others wrote."""
    print(printable(text), flush=flush)
