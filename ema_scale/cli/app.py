"""What every command shares: the application and the arguments they have in common."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ema_scale.core.terminal import PlainConsole

# `ema --help` shows these groups, whichever file defines a command.
_GROUPS = {
    "First look": ("demo", "defenses", "recommend", "explain"),
    "Before training": ("data", "select", "vector", "plan", "gate", "cache"),
    "One run": ("train", "safelora", "eval", "look", "merge", "push"),
    "Answers": ("results", "judge", "compare", "export", "report"),
    "Many runs, clusters": ("study", "sweep", "launch", "status", "logs"),
    "Measurements of the tool itself": ("bench",),
}


class InOrderOfUse(TyperGroup):
    """A group that shows its commands in `_GROUPS`; those of others come last."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = [name for names in _GROUPS.values() for name in names]
        return sorted(super().list_commands(ctx), key=lambda name: order.index(name) if name in order else len(order))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = self.list_commands(ctx)
        known = {name for group in _GROUPS.values() for name in group}
        limit = formatter.width - 6 - max(map(len, names))
        groups = {**_GROUPS, "Others": tuple(name for name in names if name not in known)}
        for title, members in groups.items():
            commands = [(name, self.get_command(ctx, name)) for name in members]
            rows = [(name, cmd.get_short_help_str(limit)) for name, cmd in commands if cmd and not cmd.hidden]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=20)


app = typer.Typer(
    cls=InOrderOfUse,
    name="ema",
    help="Fine-tune language models without turning them misaligned, and measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ema_scale {metadata.version('ema-scale')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


console = PlainConsole()
RecipePath = Annotated[Path, typer.Argument(help="a recipe file (YAML)")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, any field of the recipe")]
