"""Find run folders."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import STUDY, is_run
from ema_scale.study.grid import Study, load_study

log = logging.getLogger(__name__)


def find_study(path: Path) -> Study | None:
    """The study whose folder this is, if it is one's: a study keeps itself beside its runs."""
    study = load_study(path / STUDY) if (path / STUDY).is_file() else None
    return study if study is not None and study.name == path.resolve().name else None


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders among `paths` and directly below them, in order, without repeats.

    Below a study's folder: the study's runs, those that have not begun included; others are left out with a note.
    Raises UserError if a path does not exist or holds no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; expected a run folder or a folder of them")
        runs = [path] if is_run(path) else _below(path)
        if not any(map(is_run, runs)):
            raise UserError(f"{path}: no run here; a run folder holds a recipe.yaml (made by `ema train`)")
        found.update(dict.fromkeys(runs))
    return list(found)


def _below(path: Path) -> list[Path]:
    there = sorted(child for child in path.iterdir() if is_run(child))
    study = find_study(path)
    if study is None:
        return there
    names = study.names()
    # Relearning is done for some of the runs alone.
    runs = [path / name for name in study.run_names() if name in names or is_run(path / name)]
    others = [run.name for run in there if run not in runs]
    if others:
        log.info("%s: left out, for they are not of the study in %s: %s", path, STUDY, ", ".join(others))
    return runs
