"""Evaluate finished runs: one engine serves the base model and every adapter that was trained on it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ema_scale.errors import UserError
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate, load_suites
from ema_scale.evaluation.sampler import (
    Sampler,
    SampleRequest,
    SampleResult,
    SamplerOptions,
    make_sampler,
    sampler_name,
)
from ema_scale.evaluation.summary import Summary
from ema_scale.locate import locate
from ema_scale.recipe import Recipe, SuitesRecipe, load_recipe
from ema_scale.rundir import RunDir
from ema_scale.study.runs import is_run

log = logging.getLogger(__name__)


def evaluate_run(path: Path, overrides: tuple[str, ...] = (), with_base: bool = True) -> dict[str, Summary]:
    """Evaluate one run folder (adapter and base), or the base model of a recipe file.

    Raises UserError if `path` is neither, or the run has no adapter yet.
    """
    if is_run(path):
        return evaluate_runs([RunDir(path)], path / "base", overrides, with_base)
    if path.is_dir():
        raise UserError(f"{path}: no run here; a run folder holds a recipe.yaml (made by `ema train`)")
    recipe = load_recipe(path, overrides)
    return _evaluate_alike([], [recipe], recipe.run_path / "base")


def evaluate_runs(
    runs: Sequence[RunDir], base_dir: Path, overrides: tuple[str, ...] = (), with_base: bool = True
) -> dict[str, Summary]:
    """Evaluate the adapters of `runs` as their recipes say, and each base model once, into `base_dir`[-n]/eval.

    Answers and judgements that are there already are kept. Raises UserError for a run without an adapter.
    """
    alike: dict[str, list[tuple[RunDir, Recipe]]] = defaultdict(list)
    for run in runs:
        if not (run.adapter / "adapter_config.json").is_file():
            raise UserError(f"{run.path}: has no adapter yet (status: {run.status().get('state', 'not started')})")
        recipe = load_recipe(run.recipe_path, overrides)
        settings = recipe.evaluation.model_dump(mode="json", exclude={"suites"})
        alike[json.dumps([recipe.model.model_dump(mode="json"), settings], sort_keys=True)].append((run, recipe))
    summaries: dict[str, Summary] = {}
    for number, group in enumerate(alike.values()):
        folder = base_dir if number == 0 else base_dir.with_name(f"{base_dir.name}-{number}")
        recipes = [recipe for _, recipe in group]
        wanted = with_base and any(recipe.evaluation.compare_base for recipe in recipes)
        summaries |= _evaluate_alike([run for run, _ in group], recipes, folder if wanted else None)
    return summaries


def _evaluate_alike(runs: Sequence[RunDir], recipes: Sequence[Recipe], base_dir: Path | None) -> dict[str, Summary]:
    # Runs of one model and one way of evaluating; they may ask different suites.
    first = recipes[0]
    model = first.model.model_copy(update={"path": locate(first.model.path)})
    settings = first.evaluation
    adapters = tuple(str(run.adapter) for run in runs)
    options = SamplerOptions(model, adapters, settings.max_model_len, settings.seed)
    by_suites: dict[str, tuple[SuitesRecipe, list[RunDir]]] = {}
    for run, recipe in zip(runs, recipes, strict=False):
        suites = recipe.evaluation.suites
        by_suites.setdefault(suites.model_dump_json(), (suites, []))[1].append(run)
    summaries: dict[str, Summary] = {}
    with contextlib.closing(_LazySampler(sampler_name(settings.sampler, options), options)) as sampler:
        if base_dir is not None:
            everything = settings.model_copy(update={"suites": _union(r.evaluation.suites for r in recipes)})
            target = EvalTarget(base_dir.name, None, base_dir / "eval")
            summaries |= evaluate([target], model, load_suites(everything), everything, sampler=sampler)
        for suites, members in by_suites.values():
            theirs = settings.model_copy(update={"suites": suites})
            targets = [EvalTarget(run.path.name, run.adapter, run.eval_dir) for run in members]
            summaries |= evaluate(targets, model, load_suites(theirs), theirs, sampler=sampler)
    return summaries


def _union(parts: Iterable[SuitesRecipe]) -> SuitesRecipe:
    merged: dict[str, dict[str, None]] = defaultdict(dict)
    for suites in parts:
        for source, role in suites.pairs():
            merged[role][source] = None
    return SuitesRecipe.model_validate({role: list(sources) for role, sources in merged.items()})


class _LazySampler:
    """Starts the engine only when there is something to sample: a finished evaluation costs no start."""

    def __init__(self, name: str, options: SamplerOptions) -> None:
        self.name = name
        self._options = options
        self._sampler: Sampler | None = None

    def _open(self) -> Sampler:
        if self._sampler is None:
            self._sampler = make_sampler(self.name, self._options)
        return self._sampler

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        return self._open().sample(requests)

    def describe(self) -> dict[str, Any]:
        return self._open().describe()

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
