"""Which tokens a loss term covers, and how many there are in a whole optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ema_scale.data.rows import LEARNED, TAGS
from ema_scale.defenses.base import Scope, token_set_name
from ema_scale.defenses.row_groups import token_set_names

IGNORED = -100


def targets(labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """[B, T]: the label each position predicts (the next token's), -100 where it is not trained on.

    positions: position ids of packed rows; the last token of a row does not predict the next row's first.
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return following if positions is None else following.masked_fill(~_continues(positions), IGNORED)


def _continues(positions: Tensor) -> Tensor:
    """bool [B, T]: whether the next position belongs to the same row."""
    return torch.nn.functional.pad(positions.diff() == 1, (0, 1), value=False)


def segment_ids(positions: Tensor | None) -> Tensor | None:
    """int64 [B, T]: numbers below B * T that tell the rows in packed sequences apart; None where each holds one."""
    if positions is None:
        return None
    begins = torch.nn.functional.pad(positions.diff() != 1, (1, 0), value=True)
    width = positions.shape[1]
    return begins.long().cumsum(1) - 1 + width * torch.arange(len(positions), device=positions.device)[:, None]


def scope_masks(
    attention_mask: Tensor,
    labels: Tensor,
    tags: Tensor | None = None,
    positions: Tensor | None = None,
    template: Tensor | None = None,
    known: Sequence[str] = TAGS,
) -> dict[str, Tensor]:
    """bool [B, T] for each of `covers(known)`: the tokens of a scope in the rows of a part.

    all: every non-padding position (the paper's choice); assistant: positions that predict an assistant token, in
    learned rows the ones of the cross-entropy; prompt: positions that predict any other token of the row. tags: [B],
    places in `known`, or [B, T] of packed rows; None: all rows are the task's. positions: position ids of packed rows.
    template: [B, T], 1 on tokens that the chat template wrote; None: not known, and nothing may ask for them.
    """
    real = attention_mask.bool()
    assistant = (targets(labels, positions) != IGNORED) & real
    followed = torch.nn.functional.pad(real[:, 1:], (0, 1), value=False) & real
    if positions is not None:
        followed &= _continues(positions)
    scopes: dict[Scope, Tensor] = {
        "all": real,
        "assistant": assistant,
        "prompt": followed & ~assistant,
        "template": torch.zeros_like(real) if template is None else real & template.bool(),
    }
    tags = torch.zeros(len(labels), dtype=torch.long, device=labels.device) if tags is None else tags
    tags = tags[:, None] if tags.ndim == 1 else tags
    parts = {tag: tags == place for place, tag in enumerate(known)}
    parts = {"learned": torch.stack([parts[tag] for tag in LEARNED]).any(0), **parts}
    return {token_set_name(scope, part): mask & rows for part, rows in parts.items() for scope, mask in scopes.items()}


def attention_of(batch: dict[str, Any]) -> Tensor:
    """The batch's attention mask [B, T]; all ones if it has none."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def count_tokens(batches: Iterable[dict[str, Any]], known: Sequence[str] = TAGS) -> Tensor:
    """int64 [scopes]: tokens of each scope, in the order of `covers(known)`, over some batches."""
    names = token_set_names(known)
    total = torch.zeros(len(names), dtype=torch.int64)
    for batch in batches:
        tags, positions, template = (batch.get(name) for name in ("tags", "position_ids", "template"))
        masks = scope_masks(attention_of(batch), batch["labels"], tags, positions, template, known)
        total += torch.stack([masks[name].sum() for name in names]).cpu()
    return total


def padding_last(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with every row moved to the left end: all tensors shaped like attention_mask [B, T], the rest as it is.

    A causal model then computes of a row what it computes of the row alone. Padding in front would shift learned
    positions (GPT-2), enter recurrent states, and give positions that attend to nothing, which some models turn into
    NaN. Nothing is read back from the device.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    padding = mask.long().argmax(1, keepdim=True)
    order = (torch.arange(mask.shape[1], device=mask.device) + padding) % mask.shape[1]
    return {
        name: value.gather(1, order) if getattr(value, "shape", None) == mask.shape else value
        for name, value in batch.items()
    }
