"""Products of gradients that are given weight by weight, each taken as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Scalar, float32 or better: the product of two gradients."""
    import torch

    wide = (torch.promote_types(a.dtype, torch.float32) for a in one)
    return torch.stack([(a.to(w) * b.to(w)).sum() for a, b, w in zip(one, other, wide, strict=True)]).sum()


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Scalar: that of two gradients; 0 if one is zero."""
    import torch

    lengths = (dot(one, one) * dot(other, other)).sqrt()
    return dot(one, other) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
