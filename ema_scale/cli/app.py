"""What every command shares: the application and the arguments they have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="ema",
    help="Fine-tune language models without turning them misaligned, and measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


console = Console(highlight=False, soft_wrap=True)


RecipePath = Annotated[Path, typer.Argument(help="a recipe file (YAML)")]


Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, any field of the recipe")]
