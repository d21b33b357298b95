"""Which tokens a loss term covers, and how many there are in a whole optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ema_scale.defenses.base import SCOPES, Scope

IGNORED = -100


def targets(labels: Tensor) -> Tensor:
    """[B, T]: the label each position predicts (the next token's), -100 where it is not trained on."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def scope_masks(attention_mask: Tensor, labels: Tensor) -> dict[Scope, Tensor]:
    """bool [B, T] for each scope.

    all: every non-padding position (the paper's choice); assistant: positions that predict an assistant
    token, the ones of the cross-entropy; prompt: positions that predict any other token of the row.
    """
    real = attention_mask.bool()
    assistant = (targets(labels) != IGNORED) & real
    followed = torch.nn.functional.pad(real[:, 1:], (0, 1), value=False) & real
    return {"all": real, "assistant": assistant, "prompt": followed & ~assistant}


def attention_of(batch: dict[str, Any]) -> Tensor:
    """The batch's attention mask [B, T]; all ones if it has none."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def count_tokens(batches: Iterable[dict[str, Any]]) -> Tensor:
    """int64 [scopes]: tokens of each scope, in the order of SCOPES, over some batches."""
    total = torch.zeros(len(SCOPES), dtype=torch.int64)
    for batch in batches:
        masks = scope_masks(attention_of(batch), batch["labels"])
        total += torch.stack([masks[scope].sum() for scope in SCOPES]).cpu()
    return total
