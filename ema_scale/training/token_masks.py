"""Which tokens each token set holds in a batch, and how many there are in a whole optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ema_scale.data.rows import LEARNED, TAGS
from ema_scale.defenses.terms import Scope, TokenSet
from ema_scale.models.prefix import leading

IGNORED = -100


def targets(labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """[B, T]: the label that each position predicts (the next token's), -100 where nothing is learned.

    positions: position ids of packed rows. The last token of a row does not predict the first of the next row.
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return following if positions is None else following.masked_fill(~_continues(positions), IGNORED)


def _continues(positions: Tensor) -> Tensor:
    """bool [B, T]: whether the next position belongs to the same row."""
    return torch.nn.functional.pad(positions.diff() == 1, (0, 1), value=False)


def segment_ids(positions: Tensor | None) -> Tensor | None:
    """int64 [B, T]: a number below B * T for the row that each position of packed sequences belongs to; None if
    sequences are not packed."""
    if positions is None:
        return None
    begins = torch.nn.functional.pad(positions.diff() != 1, (1, 0), value=True)
    width = positions.shape[1]
    return begins.long().cumsum(1) - 1 + width * torch.arange(len(positions), device=positions.device)[:, None]


def row_ids(labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """int64 [B, T]: a number below B * T for the row that each position belongs to, packed or not."""
    if positions is not None:
        packed = segment_ids(positions)
        assert packed is not None
        return packed
    return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)


def token_masks(batch: Mapping[str, Any], tags: Sequence[str] = TAGS) -> dict[TokenSet, Tensor]:
    """bool [B, T] for each of `token_sets(tags)`.

    batch:
        input_ids, labels: [B, T].
        attention_mask: [B, T]; absent: all ones.
        tags: each row's place in `tags`, [B], or [B, T] if sequences are packed; absent: all rows are the task's.
        position_ids: [B, T], of packed sequences.
        template: [B, T], 1 on tokens that the chat template wrote; absent: no token set of that scope, or of the scope
            prefix, has any.
    """
    labels = batch["labels"]
    places, positions, template = (batch.get(name) for name in ("tags", "position_ids", "template"))
    real = attention_mask_of(batch).bool()
    assistant = (targets(labels, positions) != IGNORED) & real
    followed = torch.nn.functional.pad(real[:, 1:], (0, 1), value=False) & real
    if positions is not None:
        followed &= _continues(positions)
    scopes: dict[Scope, Tensor] = {
        "all": real,
        "assistant": assistant,
        "prompt": followed & ~assistant,
        "template": (written := torch.zeros_like(real) if template is None else real & template.bool()),
        "prefix": leading(written, positions),
    }
    places = torch.zeros(len(labels), dtype=torch.long, device=labels.device) if places is None else places
    places = places[:, None] if places.ndim == 1 else places
    parts = {tag: places == place for place, tag in enumerate(tags)}
    parts = {"learned": torch.stack([parts[tag] for tag in LEARNED]).any(0), **parts}
    return {TokenSet(scope, part): mask & rows for part, rows in parts.items() for scope, mask in scopes.items()}


def attention_mask_of(batch: Mapping[str, Any]) -> Tensor:
    """The batch's attention mask [B, T]; all ones if it has none."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def count_tokens(masks: Mapping[TokenSet, Tensor]) -> Tensor:
    """int64 [token sets]: tokens of each, in the order of `masks`."""
    return torch.stack([mask.sum() for mask in masks.values()])


def pad_right(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with every row moved to the left end. Changes all tensors shaped like attention_mask [B, T].

    A causal model then computes for a row what it computes for the row alone. Padding in front would shift learned
    positions (GPT-2), enter recurrent states, and give positions that attend to nothing, which some models turn into
    NaN. Nothing is read back from the device.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return dict(batch)
    padding = mask.long().argmax(1, keepdim=True)
    order = (torch.arange(mask.shape[1], device=mask.device) + padding) % mask.shape[1]
    return {
        name: value.gather(1, order) if getattr(value, "shape", None) == mask.shape else value
        for name, value in batch.items()
    }
