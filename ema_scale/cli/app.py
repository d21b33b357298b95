"""What every command shares: the application and the arguments they have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

# `ema --help` lists commands in the order of use, whichever file defines them.
_ORDER = (
    "demo", "defenses", "data", "select", "vector", "plan", "gate", "cache", "train", "safelora", "eval", "judge",
    "compare", "export", "report", "study", "sweep", "launch", "status", "logs", "bench",
)  # fmt: skip


class InOrderOfUse(TyperGroup):
    """A group that lists its commands as `_ORDER` does; others come last."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


app = typer.Typer(
    cls=InOrderOfUse,
    name="ema",
    help="Fine-tune language models without turning them misaligned, and measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

console = Console(highlight=False, soft_wrap=True)
RecipePath = Annotated[Path, typer.Argument(help="a recipe file (YAML)")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, any field of the recipe")]
