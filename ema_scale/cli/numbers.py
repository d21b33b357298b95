"""Options that are numbers: each is finite and has a lowest and a highest value, which `--help` shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from ema_scale.core.errors import UserError
from ema_scale.core.numbers import MOST


def whole(*names: str, help: str = "", low: int = 1, high: int = MOST) -> Any:
    """An option that is a whole number."""
    return typer.Option(*names, min=low, max=high, help=help)


def real(*names: str, help: str = "", low: float = 0, high: float = MOST, over: bool = False) -> Any:
    """An option that is a number; over: more than `low`."""
    metavar = f"NUMBER [{low:g}{'<' if over else '<='}x<={high:g}]"
    return typer.Option(*names, callback=_between(low, high, over), metavar=metavar, help=help)


def _between(low: float, high: float, over: bool) -> Callable[..., float | None]:
    # click's own range lets NaN pass, which is neither below nor above anything.
    def check(param: typer.CallbackParam, value: float | None) -> float | None:
        if value is None or (low < value if over else low <= value) and value <= high:
            return value
        least = f"more than {low:g}" if over else f"at least {low:g}"
        raise UserError(f"{param.opts[0]}: found {value:g}, expected {least} and at most {high:g}")

    return check
