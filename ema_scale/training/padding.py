"""Padding goes behind the rows, whatever side a collator puts it on."""

from __future__ import annotations

from typing import Any

import torch


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
