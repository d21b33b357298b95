"""Caches of keys and values: some rows of one, or the rows of two. Rows end together; padding is on the left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def empty_cache() -> Any:
    """A cache whose layers all keep every token, those with a sliding window too."""
    from transformers import DynamicCache

    return DynamicCache()


def keeps_plain_layers(config: Any) -> bool:
    """Whether the layers of a model with this config keep plain keys and values, and nothing else."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    if not all(kind in ("full_attention", "sliding_attention") for kind in kinds):
        return False
    return {type(layer) for layer in DynamicCache(config=text).layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def picked(cache: Any, rows: Tensor, start: int = 0) -> Any:
    """A new cache of the chosen rows, from token `start` on. rows: int64 [B], a row may be chosen several times."""
    new = empty_cache()
    for number, layer in enumerate(cache.layers):
        new.update(layer.keys[rows, :, start:], layer.values[rows, :, start:], number)
    return new


def joined(first: Any, second: Any) -> Any:
    """A new cache of the rows of both. The shorter ones get padding on the left."""
    new = empty_cache()
    for number, (one, other) in enumerate(zip(first.layers, second.layers, strict=True)):
        new.update(_side_by_side(one.keys, other.keys), _side_by_side(one.values, other.values), number)
    return new


def _side_by_side(one: Tensor, other: Tensor) -> Tensor:
    """[B1, heads, T1, size] and [B2, heads, T2, size] -> [B1 + B2, heads, max(T1, T2), size]."""
    width = max(one.shape[2], other.shape[2])
    return torch.cat([torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in (one, other)])
