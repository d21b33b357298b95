"""`ema cache ...`: fill the cache folder, list it and make room."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ema_scale.cli.app import Overrides, RecipePath, app
from ema_scale.cli.numbers import real
from ema_scale.core.cache import KINDS, CacheEntry, entries, remove, superfluous
from ema_scale.core.errors import UserError
from ema_scale.core.paths import cache_root
from ema_scale.core.terminal import say
from ema_scale.core.text import format_bytes, quantity


class RecipeOrCommand(TyperGroup):
    """Takes `ema cache RECIPE` for `ema cache fill RECIPE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, ["fill", *args] if args[0].endswith((".yaml", ".yml")) else args)


cache_app = typer.Typer(
    cls=RecipeOrCommand,
    help="Fill, list or prune the cache folder (EMA_CACHE).",
    no_args_is_help=True,
)
app.add_typer(cache_app, name="cache")

Kinds = Annotated[list[str] | None, typer.Option("--kind", help=f"only {', '.join(KINDS)}; repeat for more")]


@cache_app.command("fill")
def cache_fill(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Compute the reference's hidden states once, for all runs; `ema cache RECIPE` does the same.

    They are those of a recipe's rows; runs that train on the same rows read them.
    """
    from ema_scale.recipe import load_recipe
    from ema_scale.training.distributed import is_main
    from ema_scale.training.run import fill_cache

    done = fill_cache(load_recipe(recipe, overrides or ()))
    if is_main():
        say(f"{quantity(done.rows, 'row')} computed, {done.tokens} tokens, {done.seconds:.1f} s: {done.folder}")


@cache_app.command("ls")
def cache_ls(
    kind: Kinds = None, as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False
) -> None:
    """List what is in the cache: kind, size, days since it was last used."""
    found = _chosen(kind)
    if as_json:
        rows = [{"kind": e.kind, "path": str(e.path), "bytes": e.size, "used": e.used} for e in found]
        print(json.dumps(rows, indent=2))
        return
    for name, meaning in KINDS.items():
        those = [entry for entry in found if entry.kind == name]
        if not those:
            continue
        say(f"{name}: {meaning}, {format_bytes(sum(e.size for e in those))}")
        for entry in reversed(those):
            say(f"  {_line(entry)}")
    say(f"{cache_root()}: {format_bytes(sum(e.size for e in found))} in all")


@cache_app.command("prune")
def cache_prune(
    kind: Kinds = None,
    unused: Annotated[float | None, real(help="remove what was not used for so many days")] = None,
    most: Annotated[float | None, real(help="remove the least recently used above so many GB")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
) -> None:
    """Remove what is old or too much. Everything can be made again. What a process is writing stays."""
    if unused is None and most is None:
        raise UserError("ema cache prune: found neither --unused nor --most, expected days, gigabytes or both")
    limit = None if most is None else int(most * 1e9)
    chosen = superfluous(_chosen(kind), unused_days=unused, most_bytes=limit)
    gone, in_use = (chosen, []) if dry_run else remove(chosen)
    for entry in gone:
        say(f"{entry.kind} {_line(entry)}")
    for entry in in_use:
        say(f"in use, kept: {entry.path}")
    told = "would be removed" if dry_run else "removed"
    say(f"{len(gone)} entries, {format_bytes(sum(e.size for e in gone))}, {told}")


def _chosen(kinds: list[str] | None) -> list[CacheEntry]:
    for kind in kinds or ():
        if kind not in KINDS:
            raise UserError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    return [entry for entry in entries(cache_root()) if not kinds or entry.kind in kinds]


def _line(entry: CacheEntry) -> str:
    return f"{format_bytes(entry.size):>10}  {(time.time() - entry.used) / 86400:6.1f} days  {entry.path}"
