"""Find run folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ema_scale.errors import UserError
from ema_scale.rundir import RunDir


def is_run(path: Path) -> bool:
    """A run folder holds the recipe it was made from."""
    return RunDir(path).recipe_path.is_file()


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders among `paths` and directly below them, in order, without repeats.

    Raises UserError if a path does not exist or holds no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; expected a run folder or a folder of them")
        runs = [path] if is_run(path) else sorted(child for child in path.iterdir() if is_run(child))
        if not runs:
            raise UserError(f"{path}: no run here; a run folder holds a recipe.yaml (made by `ema train`)")
        found.update(dict.fromkeys(runs))
    return list(found)
