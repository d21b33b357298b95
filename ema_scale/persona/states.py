"""Mean hidden states of answers, and how far they point along a direction.

The projection is the monitor of persona vectors (arXiv 2507.21509, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ema_scale.core.batching import batch_by_length
from ema_scale.core.errors import UserError
from ema_scale.core.progress import Progress
from ema_scale.data.collate import ChatCollator
from ema_scale.data.rows import Row
from ema_scale.data.tokens import Encoder
from ema_scale.models.directions import Directions
from ema_scale.models.hooks import capture
from ema_scale.models.layout import causal_lm, decoder_layers, hidden_size

BATCH_TOKENS = 8192


@torch.no_grad()
def response_means(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    layers: Sequence[int],
    *,
    max_length: int = 2048,
    batch_tokens: int = BATCH_TOKENS,
    label: str = "hidden states",
) -> Tensor:
    """Each row's hidden states, averaged over the assistant's tokens: float32 [rows, layers, H], on the CPU.

    A row's result does not depend on its batch. A row without an assistant token within max_length is NaN. Raises
    UserError for a layer that the model does not have, and for a row whose mask cannot be found.

    Args:
        model: a causal LM, with PEFT's wrapper or without. Its adapters act as they are set.
        layers: 0 for the embeddings, k for the residual stream after decoder layer k, before the final norm.
        batch_tokens: tokens per batch, with padding.
    """
    stack = decoder_layers(model)
    wrong = [k for k in layers if not 0 <= k <= len(stack)]
    if wrong:
        raise UserError(f"layers: found {wrong[0]}, expected 0 to {len(stack)}")
    encoded = _encode(tokenizer, rows, max_length)
    means = torch.full((len(rows), len(layers), hidden_size(model)), float("nan"))
    device = next(model.parameters()).device
    backbone = causal_lm(model).base_model
    collate = ChatCollator(tokenizer)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with Progress(label, len(encoded), unit="row") as progress:
            for numbers in batch_by_length(encoded, lambda n: len(encoded[n]["input_ids"]), batch_tokens):
                batch = collate([encoded[n] for n in numbers])
                answered = (batch["labels"] != -100).to(device)
                seen: dict[int, Tensor] = {}

                def keep(layer: int, state: Tensor, where: Tensor = answered, into: dict[int, Tensor] = seen) -> None:
                    # Selected, not multiplied: padding may hold anything.
                    kept = torch.where(where[..., None], state.float(), 0.0)
                    into[layer] = kept.sum(1) / where.sum(1, keepdim=True)

                with capture(stack, layers, keep):
                    backbone(
                        input_ids=batch["input_ids"].to(device),
                        attention_mask=batch["attention_mask"].to(device),
                        use_cache=False,
                    )
                means[numbers] = torch.stack([seen[k] for k in layers], 1).cpu()
                progress.add(len(numbers))
    finally:
        for module in training:
            module.training = True
    return means


def _encode(tokenizer: Any, rows: Sequence[Row], max_length: int) -> dict[int, dict[str, list[int]]]:
    """Row number -> input_ids and labels, of the rows that have an assistant token."""
    encoder = Encoder(tokenizer)
    encoded = {}
    for number, row in enumerate(rows):
        try:
            found = encoder.encode(row.messages, max_length, tools=row.tools)
        except UserError as error:
            raise UserError(f"{row.origin}: {error}") from None
        if found.assistant_mask.any():
            ids, mask = found.input_ids.tolist(), found.assistant_mask.tolist()
            encoded[number] = {"input_ids": ids, "labels": [t if m else -100 for t, m in zip(ids, mask, strict=True)]}
    return encoded


def project_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    directions: Directions,
    layer: int | None = None,
    *,
    max_length: int = 2048,
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """One number per row: the mean hidden state of its assistant tokens, times the layer's unit direction.

    The unit is that of hidden states, and the origin has no meaning: compare rows with rows of a clean set. A row
    without an assistant token within max_length is NaN. Raises UserError for directions of a model of another shape,
    and as `response_means` does.

    Args:
        layer: None for the one that the directions recommend.
        batch_tokens: tokens per batch, with padding.
    """
    directions.check(len(decoder_layers(model)), hidden_size(model))
    layer = directions.recommended_layer if layer is None else layer
    unit = directions.unit(layer)
    means = response_means(
        model, tokenizer, rows, [layer], max_length=max_length, batch_tokens=batch_tokens, label="projections"
    )
    return [float(value) for value in means[:, 0] @ unit]
