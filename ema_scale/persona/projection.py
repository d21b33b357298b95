"""How far rows point along a direction: the projection monitor of persona vectors (arXiv 2507.21509, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ema_scale.data.rows import Row
from ema_scale.models.directions import Directions
from ema_scale.models.layout import decoder_layers, hidden_size
from ema_scale.persona.states import BATCH_TOKENS, response_means


def project_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    directions: Directions,
    layer: int | None = None,
    *,
    max_length: int = 2048,
    batch_tokens: int = BATCH_TOKENS,
    label: str = "projections",
) -> list[float]:
    """One number a row, in its order: the mean hidden state of its assistant tokens, times the layer's unit direction.

    The unit is that of hidden states, and the origin has no meaning: compare rows with rows of a clean set. layer:
    default the one that the directions recommend. A row without an assistant token within max_length is NaN.
    Raises UserError for directions of a model of another shape, and as `response_means` does.
    """
    directions.check(len(decoder_layers(model)), hidden_size(model))
    layer = directions.recommended_layer if layer is None else layer
    unit = directions.unit(layer)
    means = response_means(
        model, tokenizer, rows, [layer], max_length=max_length, batch_tokens=batch_tokens, label=label
    )
    return [float(value) for value in means[:, 0] @ unit]
