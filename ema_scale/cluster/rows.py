"""Are the files there whose rows runs are going to read? Asked before anything is submitted, not on a node, later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ema_scale.chat.rows import FILE_SUFFIXES
from ema_scale.errors import UserError
from ema_scale.recipe import Recipe

_SHOWN = 10


def refuse_missing_rows(recipes: Iterable[Recipe], made: Iterable[str] = ()) -> None:
    """Raises UserError naming run and field of every file of rows that is not there, nor among those `made` later."""
    coming = set(made)
    wrong = [
        f"{recipe.run_path}: {field}: {source}: no such file"
        for recipe in recipes
        for field, source in _sources(recipe)
        if source not in coming and _is_local(source) and not Path(source).is_file()
    ]
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise UserError("\n".join([*wrong[:_SHOWN], *more]))


def _sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for source in recipe.data.sources:
        yield "data.train", source
    for i, defense in enumerate(recipe.defenses):
        for name in ("source", "prompts"):
            given = getattr(defense, name, None)
            for source in [given] if isinstance(given, str) else given if isinstance(given, list) else []:
                yield f"defenses.{i}.{name}", source


def _is_local(source: str) -> bool:
    """Neither a hub id nor of the small world."""
    return Path(source).suffix in FILE_SUFFIXES or source.startswith(("/", "./", "../", "~"))
