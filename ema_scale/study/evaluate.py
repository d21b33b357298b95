"""Evaluate finished runs: one engine serves the base model and every adapter that was trained on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ema_scale.errors import UserError
from ema_scale.evaluation.conditions import training_condition
from ema_scale.evaluation.gate import note_other_references, refuse, refuses
from ema_scale.evaluation.judge_check import FOLDER as CHECK
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate, is_complete, load_suites
from ema_scale.evaluation.suite import Suite
from ema_scale.evaluation.summary import Summary
from ema_scale.recipe import Recipe, load_recipe
from ema_scale.rundir import RunDir
from ema_scale.study.along import along
from ema_scale.study.bases import together
from ema_scale.study.runs import find_runs, is_run

log = logging.getLogger(__name__)
_Grouped = TypeVar("_Grouped")


def evaluate_run(path: Path, overrides: tuple[str, ...] = (), with_base: bool = True) -> dict[str, Summary]:
    """Evaluate one run folder (adapter and base), the trained runs in a folder, or the base model of a recipe file.

    Raises UserError if `path` is none of these, or no run has an adapter yet.
    """
    if is_run(path):
        pairs = _with_recipes([RunDir(path)], overrides)
        recipes = [recipe for _, recipe in pairs]
        base = path / "base" if with_base and _wants_base(recipes) else None
        return evaluate_alike([run for run, _ in pairs], recipes, base, path)
    if path.is_dir():
        return evaluate_runs(_trained(path), path / "base", overrides, with_base)
    recipe = load_recipe(path, overrides)
    return evaluate_alike([], [recipe], recipe.run_path / "base", recipe.run_path)


def evaluate_runs(
    runs: Sequence[RunDir], base_dir: Path, overrides: tuple[str, ...] = (), with_base: bool = True
) -> dict[str, Summary]:
    """Evaluate the adapters of `runs` as their recipes say, and each base model once, into `base_dir`/eval, or that of
    another name where there are several (see `bases`).

    Answers and judgements that are there already are kept. Raises UserError for a run without an adapter, and, when
    everything is written, for a base model that its recipe's gate refuses, and for a model whose evaluation failed.
    """
    summaries: dict[str, Summary] = {}

    def work(folder: Path, group: Sequence[tuple[RunDir, Recipe]]) -> None:
        recipes = [recipe for _, recipe in group]
        base = folder if with_base and _wants_base(recipes) else None
        summaries.update(evaluate_alike([run for run, _ in group], recipes, base, base_dir.parent))

    each_group(together(_with_recipes(runs, overrides), base_dir), work)
    return summaries


def each_group(groups: Sequence[tuple[Path, _Grouped]], work: Callable[[Path, _Grouped], None]) -> None:
    """`work` on every group, also if an earlier one failed; then raises why."""
    failed: list[tuple[Path, Exception]] = []
    for folder, group in groups:
        try:
            work(folder, group)
        except Exception as error:  # one model's fault is no reason to ask nothing of the others
            if len(groups) == 1:
                raise
            log.error("%s: %s", folder, error, exc_info=None if isinstance(error, UserError) else error)
            failed.append((folder, error))
    if failed:
        told = [f"  {f}: {e if isinstance(e, UserError) else f'{type(e).__name__}: {e}'}" for f, e in failed]
        raise UserError(f"{len(failed)} of {len(groups)} base models' evaluations failed:\n" + "\n".join(told))


def _with_recipes(runs: Iterable[RunDir], overrides: tuple[str, ...]) -> list[tuple[RunDir, Recipe]]:
    pairs = []
    for run in runs:
        if not _has_adapter(run):
            raise UserError(f"{run.path}: has no adapter yet (status: {run.status().get('state', 'not started')})")
        pairs.append((run, load_recipe(run.recipe_path, overrides)))
    return pairs


def is_evaluated(recipes: Sequence[Recipe], base_dir: Path) -> bool:
    """Whether `evaluate_runs` would find nothing to do for these finished runs. Loads no model."""
    for folder, group in together([(r, r) for r in recipes], base_dir):
        alike = [recipe for _, recipe in group]
        base = folder if _wants_base(alike) else None
        targets = targets_of([RunDir(r.run_path) for r in alike], alike, base, export=False)
        if not is_complete(targets, alike[0].model, alike[0].evaluation):
            return False
    return True


def _trained(folder: Path) -> list[RunDir]:
    runs = [RunDir(path) for path in find_runs([folder])]
    for run in runs:
        if not _has_adapter(run):
            status = run.status()
            reason = f": {status['reason']}" if status.get("reason") else ""
            log.warning("%s: left out: %s%s", run.path, status.get("state", "not started"), reason)
    trained = [run for run in runs if _has_adapter(run)]
    if not trained:
        raise UserError(f"{folder}: none of its {len(runs)} runs has an adapter yet")
    return trained


def _has_adapter(run: RunDir) -> bool:
    return (run.adapter / "adapter_config.json").is_file()


def _wants_base(recipes: Sequence[Recipe]) -> bool:
    # A gate that refuses cannot be passed by not asking.
    return any(r.evaluation.compare_base or refuses(r) for r in recipes)


def evaluate_alike(
    runs: Sequence[RunDir], recipes: Sequence[Recipe], base_dir: Path | None, beside: Path
) -> dict[str, Summary]:
    """Runs of one model and one way of evaluating, which may ask different suites: one engine for all.

    base_dir: the base model's folder, None: it is not asked. beside: what the judge's check lies in. Raises UserError
    if the recipes refuse the base model.
    """
    first = recipes[0]
    targets = targets_of(runs, recipes, base_dir)
    summaries = evaluate(targets, first.model, None, first.evaluation, judge_check=beside / CHECK)
    if base_dir is not None:
        refuse(summaries[base_dir.name])
        note_other_references(recipes)
    return summaries


def targets_of(
    runs: Sequence[RunDir], recipes: Sequence[Recipe], base_dir: Path | None, export: bool = True
) -> list[EvalTarget]:
    """What `evaluate_alike` asks; `export`: adapters along training are written for it."""
    suites = asked_suites(recipes)
    targets = []
    for run, recipe, theirs in zip(runs, recipes, suites, strict=False):
        targets.append(EvalTarget(run.path.name, run.adapter, run.eval_dir, tuple(theirs)))
        if recipe.evaluation.checkpoints:
            targets += along(run, recipe, tuple(theirs), export)
    if base_dir is not None:
        every = [replace(s, condition=s.condition and replace(s.condition, own=False)) for each in suites for s in each]
        asked = {(suite.source, suite.role, suite.condition): suite for suite in every}
        targets.insert(0, EvalTarget(base_dir.name, None, base_dir / "eval", tuple(asked.values())))
    return targets


def asked_suites(recipes: Sequence[Recipe]) -> list[list[Suite]]:
    """What each recipe's run is asked: its suites, the general ones again under its conditions, and under the
    prompt that it was trained with or, if it says `every_arm`, that any of these was trained with."""
    own = [training_condition(recipe.defenses) for recipe in recipes]
    asked = []
    for recipe, theirs in zip(recipes, own, strict=True):
        settings = recipe.evaluation
        also = {theirs.name: theirs} if theirs is not None and settings.inoculation != "never" else {}
        if settings.inoculation == "every_arm":
            also = {c.name: replace(c, own=False) for c in own if c is not None} | also
        asked.append(load_suites(settings, tuple(also.values())))
    return asked
