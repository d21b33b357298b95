"""Find the runs that a path names, and evaluate them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ema_scale.config.sections import EvaluationRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir, is_run
from ema_scale.core.text import quantity
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.records import Summary
from ema_scale.evaluation.runs import (
    Engines,
    evaluate_group,
    evaluate_runs,
    group_by_base,
    has_adapter,
    targets_of,
    wants_base,
    with_recipes,
)
from ema_scale.recipe import load_recipe
from ema_scale.study.find import find_runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedGroup:
    """Targets of one base model that are evaluated in one way. place: the folder of their run or study."""

    targets: list[EvalTarget]
    model: ModelRecipe
    settings: EvaluationRecipe
    place: Path


def evaluate_run(
    path: Path,
    overrides: tuple[str, ...] = (),
    with_base: bool = True,
    engines: int | None = None,
    assisted: bool = False,
) -> dict[str, Summary]:
    """Evaluate one run folder (adapter and base), the trained runs in a folder, or the base model of a recipe file.

    Args:
        path: of the run, the folder or the recipe.
        overrides: `key=value` for every recipe.
        with_base: whether base models are evaluated. Those that a gate may refuse always are.
        engines: how many sample together, each a process with GPUs of its own; None: one, in this process.
        assisted: only one of them is started here; others lend theirs (`evaluation.runs.assist`).

    Raises UserError if `path` is none of these, or no run has an adapter yet.
    """
    together = None if engines is None else Engines(engines, assisted)
    if is_run(path):
        pairs = with_recipes([RunDir(path)], overrides)
        recipes = [recipe for _, recipe in pairs]
        base = path / "base" if with_base and wants_base(recipes) else None
        return evaluate_group([run for run, _ in pairs], recipes, base, path, together)
    if path.is_dir():
        return evaluate_runs(_trained(path), path / "base", overrides, with_base, together)
    recipe = load_recipe(path, overrides)
    return evaluate_group([], [recipe], recipe.run_path / "base", recipe.run_path, together)


def planned_evaluation(path: Path, overrides: tuple[str, ...] = (), with_base: bool = True) -> list[PlannedGroup]:
    """What `evaluate_run` would do, group by group. Raises UserError as it does; samples and writes nothing."""
    if is_run(path):
        pairs = with_recipes([RunDir(path)], overrides)
        groups = [(path / "base", pairs)]
    elif path.is_dir():
        groups = group_by_base(with_recipes(_trained(path), overrides), path / "base")
    else:
        recipe = load_recipe(path, overrides)
        targets = targets_of([], [recipe], recipe.run_path / "base", export=False)
        return [PlannedGroup(targets, recipe.model, recipe.evaluation, recipe.run_path)]
    found = []
    for folder, group in groups:
        recipes = [recipe for _, recipe in group]
        base = folder if with_base and wants_base(recipes) else None
        targets = targets_of([run for run, _ in group], recipes, base, export=False)
        found.append(PlannedGroup(targets, recipes[0].model, recipes[0].evaluation, path))
    return found


def _trained(folder: Path) -> list[RunDir]:
    runs = [RunDir(path) for path in find_runs([folder])]
    for run in runs:
        if not has_adapter(run):
            status = run.status()
            reason = f": {status.reason}" if status.reason else ""
            log.warning("%s: left out: %s%s", run.path, status.state, reason)
    trained = [run for run in runs if has_adapter(run)]
    if not trained:
        raise UserError(f"{folder}: none of its {quantity(len(runs), 'run')} has an adapter yet")
    return trained
