"""Draws from a softmax with one random stream per answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor


class SeededSampling(LogitsProcessor):
    """Turns greedy search into sampling with one random stream a row, by the Gumbel-max trick.

    argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T). `generate` itself draws a whole
    batch from one stream: an answer would depend on its neighbours and on what a resumed run did before.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        temperatures: Sequence[float],
        top_ps: Sequence[float],
    ) -> None:
        self.generators, self.temperatures, self.top_ps = generators, temperatures, top_ps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V], float: next-token logits; returns noisy ones (greedy rows, T = 0, as they are)."""
        scores = scores.float()
        for row, generator in enumerate(self.generators):
            temperature = self.temperatures[row]
            if temperature == 0:
                continue
            logits = keep_top_p(scores[row] / temperature, self.top_ps[row])
            exponential = torch.empty_like(logits).exponential_(generator=generator)
            scores[row] = logits - exponential.log()
        return scores


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """logits [V] with -inf outside the smallest set of tokens whose probability reaches `top_p`."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(outside.scatter(0, order, outside), float("-inf"))
