"""Are the files there whose rows runs are going to read? Asked before anything is submitted, not on a node, later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.data.readers import SUFFIXES
from ema_scale.planning.eval_cost import engine_gpus
from ema_scale.recipe import Recipe
from ema_scale.slurm.site import Site

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
    return Path(source).suffix in SUFFIXES or source.startswith(("/", "./", "../", "~"))


def evaluation_gpus(recipes: Sequence[Recipe], site: Site) -> int:
    """What the largest engine of `recipes` takes, and at least what the site says; 0 on nodes without GPUs.

    Raises UserError, naming run and field, if an evaluation node has not so many, or the engine gives no number.
    """
    node = site.evaluation_node()
    most, where = 1, ""
    for recipe in recipes:
        for field, engine in _engines(recipe):
            taken = engine_gpus(engine, f"{recipe.name}: {field}")
            if taken > most:
                most, where = taken, f"{recipe.name}: {field}"
    if 0 < node < most:
        raise UserError(
            f"{where}: found tensor_parallel_size x pipeline_parallel_size = {most} GPUs, and an evaluation node has "
            f"{node}; ask for fewer, or say evaluation.gpus_per_node in the site file"
        )
    return min(node, max(most if where else 0, site.evaluation.gpus))


def _engines(recipe: Recipe) -> list[tuple[str, Mapping[str, Any]]]:
    # The judge's engine is loaded when the sampler's is gone: the larger of them counts, not the sum.
    asked = recipe.evaluation
    sampler = [("evaluation.engine", asked.engine)] if asked.sampler in ("auto", "vllm") else []
    judge = [("evaluation.judge.engine", asked.judge.engine)] if asked.judge.kind == "vllm" else []
    return [*sampler, *judge]
