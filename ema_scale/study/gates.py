"""The reference gate of a run or a study, before anything is trained on the base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.evaluation.gate import gate, note_other_references, refuse, refuses
from ema_scale.evaluation.records import SUMMARY_FILE, Summary
from ema_scale.evaluation.runs import evaluate_group, for_each_group, group_by_base, is_group_evaluated
from ema_scale.recipe import Recipe, load_recipe
from ema_scale.study.find import find_study
from ema_scale.study.grid import is_study, load_study

_Groups = list[tuple[Path, list[Recipe]]]  # each base model's folder, and the runs on it


def ask_references(path: Path, overrides: tuple[str, ...] = ()) -> dict[Path, Summary]:
    """The gate of every base model of a recipe file, a study file, or a folder of recipe files of one study: folder ->
    summary.

    The answers are those that the runs' evaluation asks for, and are kept for it. Raises UserError if a recipe refuses
    its base model.
    """
    if path.is_dir():
        recipes = [load_recipe(file, overrides) for file in sorted(path.glob("*.yaml"))]
        if not recipes:
            raise UserError(f"{path}: no recipe file (*.yaml) in there")
        folders = {Path(recipe.output) for recipe in recipes}
        if len(folders) > 1 or find_study(base := folders.pop()) is None:
            raise UserError(f"{path}: expected the recipes of one study; name a recipe or a study file")
        return _ask(_alike(recipes, base / "base"), base)
    if is_study(path):
        study = load_study(path)
        return _ask(_alike(study.runs(overrides), study.path / "base"), study.path)
    recipe = load_recipe(path, overrides)
    return _ask([(recipe.run_path / "base", [recipe])], recipe.run_path)


def check_references(recipes: Sequence[Recipe], base_dir: Path) -> None:
    """As `ask_references`, of the base models whose recipes refuse an unsafe one."""
    _ask(_refusing(recipes, base_dir), base_dir.parent)


def refuse_known(recipes: Sequence[Recipe], base_dir: Path) -> None:
    """As `check_references`, of what has been asked and judged already. Loads no model."""
    for folder, group in _refusing(recipes, base_dir):
        note_other_references(group)
        if _is_asked(folder, group):
            metrics = Summary.read(folder / "eval" / SUMMARY_FILE).metrics
            found = gate(metrics["general_misaligned"], group[0].evaluation.gate, metrics.get("general_choices"))
            refuse(found)


def is_checked(recipes: Sequence[Recipe], base_dir: Path) -> bool:
    """Whether `check_references` would find nothing to ask. Loads no model."""
    return all(_is_asked(folder, group) for folder, group in _refusing(recipes, base_dir))


def _ask(groups: _Groups, beside: Path) -> dict[Path, Summary]:
    found: dict[Path, Summary] = {}

    def ask(folder: Path, group: Sequence[Recipe]) -> None:
        found[folder] = evaluate_group([], group, folder, beside)[folder.name]

    for_each_group(groups, ask)
    return found


def _alike(recipes: Sequence[Recipe], base_dir: Path) -> _Groups:
    return [(folder, [r for _, r in group]) for folder, group in group_by_base([(r, r) for r in recipes], base_dir)]


def _refusing(recipes: Sequence[Recipe], base_dir: Path) -> _Groups:
    return [(folder, group) for folder, group in _alike(recipes, base_dir) if refuses(group[0])]


def _is_asked(folder: Path, recipes: Sequence[Recipe]) -> bool:
    there = (folder / "eval" / "summary.json").exists()
    return there and is_group_evaluated([], recipes, folder)
