"""A direction from two sets of hidden states, and how well it separates them on held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ema_scale.core.errors import UserError
from ema_scale.core.text import quantity
from ema_scale.data.rows import Row


@dataclass(frozen=True)
class LayerReading:
    """How well one layer separates the two sets.

    norm: ||v||.
    residual_norm: mean norm of the states that v was made from.
    auc, cohens_d: of the held-out projections, positive over negative. 0.5 and 0 are no difference.
    """

    layer: int
    norm: float
    residual_norm: float
    auc: float
    cohens_d: float


def question_of(row: Row) -> str:
    """What was asked: the text of all user turns. Rows of one question are not independent."""
    return "\n".join(message["content"] for message in row.messages if message["role"] == "user")


def difference(positive: Tensor, negative: Tensor) -> Tensor:
    """mean(positive) - mean(negative) over rows: float32 [rows, layers, H] twice -> [layers, H]."""
    return (positive.double().mean(0) - negative.double().mean(0)).float()


def read_layers(
    positive: Tensor, negative: Tensor, asked_positive: Sequence[str], asked_negative: Sequence[str]
) -> list[LayerReading]:
    """Every layer's reading. positive, negative: states [rows, layers, H]; asked_*: each row's question.

    The questions are split in two halves. The direction from one half is measured on the other, and the other way
    round; the mean of both is given. Raises UserError if a half has no two rows of each side.
    """
    vectors = difference(positive, negative)
    order = {question: i for i, question in enumerate(sorted({*asked_positive, *asked_negative}))}
    halves_positive = torch.tensor([order[q] % 2 for q in asked_positive])
    halves_negative = torch.tensor([order[q] % 2 for q in asked_negative])
    sides = [(positive[halves_positive == h], negative[halves_negative == h]) for h in (0, 1)]
    if any(len(states) < 2 for pair in sides for states in pair):
        counts = f"{len(positive)} positive and {len(negative)} negative rows over {quantity(len(order), 'question')}"
        raise UserError(f"found {counts}, expected at least two of each on both halves of the questions; give more")
    folds = [(difference(*sides[1 - h]), *sides[h]) for h in (0, 1)]
    readings = []
    for layer in range(vectors.shape[0]):
        scores = [_separation(p[:, layer] @ v[layer], n[:, layer] @ v[layer]) for v, p, n in folds]
        auc, d = np.mean(scores, axis=0)
        residual = torch.cat([positive[:, layer], negative[:, layer]]).norm(dim=-1).mean()
        readings.append(LayerReading(layer, float(vectors[layer].norm()), float(residual), float(auc), float(d)))
    return readings


def recommend(readings: Sequence[LayerReading]) -> int:
    """The layer of the largest held-out Cohen's d in the second and third quarter of the model's depth.

    Early layers hold words. The last ones hold the next word, and no layer after them can use it.
    """
    last = readings[-1].layer
    middle = [r for r in readings if last / 4 <= r.layer <= 3 * last / 4 and r.layer > 0] or list(readings[1:])
    return max(middle, key=lambda r: r.cohens_d).layer


def _separation(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """AUC and Cohen's d (pooled standard deviation) of two samples of projections."""
    p, n = positive.double().numpy(), negative.double().numpy()
    auc = stats.mannwhitneyu(p, n).statistic / (len(p) * len(n))
    pooled = ((len(p) - 1) * p.var(ddof=1) + (len(n) - 1) * n.var(ddof=1)) / (len(p) + len(n) - 2)
    gap = float(p.mean() - n.mean())
    return float(auc), gap / max(float(np.sqrt(pooled)), 1e-12) if gap else 0.0
