"""Three ways to one vector per layer: personas that a judge confirms, two sets of rows, or an adapter and its base.

All are v = mean(positive) - mean(negative) of response-token mean hidden states (arXiv 2507.21509, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import folder_identity
from ema_scale.core.records import package_versions
from ema_scale.core.uri import locate
from ema_scale.data.rows import Row, load_rows
from ema_scale.data.tokens import load_tokenizer
from ema_scale.evaluation.suites import load_suite
from ema_scale.models.directions import Directions
from ema_scale.models.layout import decoder_layers
from ema_scale.models.load import load_base
from ema_scale.models.lora import with_adapters
from ema_scale.models.weights import adapter_files
from ema_scale.persona.contrast import difference, question_of, read_layers, recommend
from ema_scale.persona.sampled import NEGATIVE, POSITIVE, load_personas, sample_personas
from ema_scale.persona.states import response_means
from ema_scale.recipe import Recipe

VECTOR_FILE = "vector.safetensors"


def from_personas(
    recipe: Recipe, personas: Path | str, questions: Sequence[str], folder: Path, *, samples: int = 10
) -> Directions:
    """A persona vector: sample under contrastive system prompts, judge, keep confirmed pairs, take means.

    recipe: model, sampler and judge. questions: suites; none: the recipe's general ones. samples: answers to each
    question under each prompt. Answers and judgements go into `folder`, the vector into its vector.safetensors.
    Raises UserError for bad prompts or questions, and if too few pairs are confirmed.
    """
    prompts = load_personas(personas)
    sources = list(questions) or list(recipe.evaluation.suites.general)
    if not sources:
        raise UserError("no questions: name a suite (--questions), or set evaluation.suites.general in the recipe")
    settings = recipe.evaluation.model_copy(update={"samples_per_question": samples})
    suites = [load_suite(source, "general") for source in sources]
    found = sample_personas(prompts, suites, recipe.model, settings, folder)
    pairs = len(found.positive)
    provenance = {
        "method": "personas",
        "personas": asdict(prompts),
        "questions": sources,
        "judge": found.summary.judge,
        "sampler": found.summary.sampler,
        "answers": found.counts,
        "rows": {POSITIVE: pairs, NEGATIVE: pairs},
    }
    model, tokenizer = _load(recipe)
    states = [_states(model, tokenizer, rows, recipe) for rows in (found.positive, found.negative)]
    asked = [[question_of(row) for row in rows] for rows in (found.positive, found.negative)]
    return _save(recipe, states, asked, provenance, folder)


def from_rows(recipe: Recipe, positive: str, negative: str, folder: Path) -> Directions:
    """A vector from two files of chat rows, as they are: no sampling, no judge.

    Rows need not pair. Take them over the same questions: the vector also holds the difference of the questions. Raises
    UserError for rows that cannot be read, and for too few of them.
    """
    sides = [load_rows(locate(source)) for source in (positive, negative)]
    provenance = {
        "method": "rows",
        "sources": {positive: sides[0].sha256, negative: sides[1].sha256},
        "rows": {POSITIVE: len(sides[0]), NEGATIVE: len(sides[1])},
    }
    model, tokenizer = _load(recipe)
    states = [_states(model, tokenizer, side, recipe) for side in sides]
    return _save(recipe, states, [[question_of(row) for row in side] for side in sides], provenance, folder)


def from_adapter(recipe: Recipe, adapter: Path, rows: str, folder: Path) -> Directions:
    """The effect of an adapter on hidden states: means with it, minus means of the base model, over the same rows.

    Raises UserError if there is no adapter there, and for rows that cannot be read.
    """
    adapter_files(str(adapter))
    found = load_rows(locate(rows))
    provenance = {
        "method": "adapter",
        "adapter": {"path": str(adapter), "identity": folder_identity(str(adapter))},
        "sources": {rows: found.sha256},
        "rows": {POSITIVE: len(found), NEGATIVE: len(found)},
    }
    base, tokenizer = _load(recipe)
    model = with_adapters(base, {"default": str(adapter)}).eval()
    adapted = _states(model, tokenizer, found, recipe)
    with model.disable_adapter():
        states = [adapted, _states(model, tokenizer, found, recipe)]
    return _save(recipe, states, [[question_of(row) for row in found]] * 2, provenance, folder)


def _load(recipe: Recipe) -> tuple[Any, Any]:
    m = recipe.model
    tokenizer = load_tokenizer(
        locate(m.path), revision=m.revision, trust_remote_code=m.trust_remote_code, chat_template=m.chat_template
    )
    model = load_base(m)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _states(model: Any, tokenizer: Any, rows: Sequence[Row], recipe: Recipe) -> Tensor:
    layers = range(len(decoder_layers(model)) + 1)
    return response_means(model, tokenizer, rows, layers, max_length=recipe.data.max_length)


def _save(
    recipe: Recipe, states: Sequence[Tensor], asked: Sequence[list[str]], provenance: dict[str, Any], folder: Path
) -> Directions:
    kept = [~torch.isnan(side).flatten(1).any(1) for side in states]
    cut = sum(int((~k).sum()) for k in kept)
    positive, negative = (side[k] for side, k in zip(states, kept, strict=True))
    asked = [[q for q, k in zip(questions, keep.tolist(), strict=True) if k]
             for questions, keep in zip(asked, kept, strict=True)]  # fmt: skip
    readings = read_layers(positive, negative, *asked)
    path = locate(recipe.model.path)
    directions = Directions(
        difference(positive, negative),
        {
            "schema": 1,
            **provenance,
            "rows_without_answer_tokens": cut,
            "model": {"path": path, "revision": recipe.model.revision, "dtype": recipe.model.dtype,
                      "identity": folder_identity(path, recipe.model.revision)},
            "seed": recipe.evaluation.seed,
            "layers": [asdict(reading) for reading in readings],
            "recommended_layer": recommend(readings),
            "packages": package_versions(),  # and no date: runs know their vectors by these bytes
        },
        str(folder / VECTOR_FILE),
    )  # fmt: skip
    directions.save(folder / VECTOR_FILE)
    return directions
