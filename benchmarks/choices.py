"""How fast written answers are scored: shared prefixes and batches against one answer at a time.

All variants score the same answers with the same weights in one process, and must agree before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Measured, Target, Variant, compare
from ema_scale.choices.bank import load_choices
from ema_scale.choices.likelihood import Inputs, Scorer, target_likelihoods
from ema_scale.choices.tokens import AnswerTokens, encode_answers
from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.uri import locate
from ema_scale.data.tokens import Encoder, load_tokenizer
from ema_scale.models.layout import ModelLayout
from ema_scale.models.load import load_base

ALONE, BATCHED, SHARED = "one answer at a time", "batches", "batches with shared prefixes"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # nats per token


def bench_choices(
    model: str, source: str, dtype: str, *, answers: int, repeats: int
) -> tuple[list[Measured], list[Target]]:
    """Time three ways to score the first `answers` written answers of a bank. Figures: `cpu_ms`, processor milliseconds
    per answer, which other load disturbs less than elapsed time. Raises UserError if the ways disagree."""
    recipe = ModelRecipe(path=model, dtype=dtype)
    base = load_base(recipe).eval()
    layout, encoder = ModelLayout.of(base, adapters=False), Encoder(load_tokenizer(locate(model)))
    rows: list[AnswerTokens] = []
    for one in load_choices(source):
        rows += encode_answers(encoder, one.messages, [answer.text for answer in one.answers], one.where)
    rows = rows[:answers]

    def forward(inputs: Inputs) -> torch.Tensor:
        return target_likelihoods(layout.backbone(**inputs.arguments())[0], inputs.targets, layout.head())

    def totals(**options: Any) -> dict[int, float]:
        return dict(Scorer(forward, base.config, torch.device("cpu"), **options).totals(rows))

    ways: dict[str, Callable[[], dict[int, float]]] = {
        ALONE: lambda: totals(batch_tokens=1, share=False),
        BATCHED: lambda: totals(share=False),
        SHARED: totals,
    }
    first = {name: way() for name, way in ways.items()}
    for name, found in first.items():
        apart = max(abs(found[i] - first[ALONE][i]) / row.count for i, row in enumerate(rows))
        if apart > TOLERANCE[dtype]:
            raise UserError(f"{name}: likelihoods are {apart:.2g} nats per token from those of single answers")

    def timed(way: Callable[[], dict[int, float]]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            began = time.process_time()
            way()
            return {"cpu_ms": 1000 * (time.process_time() - began) / len(rows)}

        return run

    variants = [Variant(name, timed(way)) for name, way in ways.items()]
    return compare(variants, baseline=ALONE, repeats=repeats), []
