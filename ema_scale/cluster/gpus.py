"""How many GPUs an evaluation takes: its engines say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ema_scale.cluster.site import Site
from ema_scale.errors import UserError
from ema_scale.planning.engines import engine_gpus
from ema_scale.recipe import Recipe


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
