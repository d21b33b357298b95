"""The language-model head: from last hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * (h W^T + b)), cap(z) = softcap * tanh(z / softcap); weight [V, H], bias [V]."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def head_products(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """h W^T [C, V] of hidden states [C, H], in the head's own dtype or already in `dtype`."""
    import torch

    hidden = hidden.to(head.weight.dtype)
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        # Tensor cores multiply in half precision and accumulate in float32 anyway: keep the accumulated value.
        return torch.mm(hidden, head.weight.t(), out_dtype=torch.float32)
    return torch.mm(hidden, head.weight.t())


def logits_of(products: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Logits [C, V] in `dtype`, after bias, scale and softcap. They take the place of `products` where the dtype is the
    same."""
    logits = products.to(dtype)
    if head.bias is not None:
        logits += head.bias
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def head_logits(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Logits [C, V] of hidden states [C, H], in `dtype`, after bias, scale and softcap."""
    return logits_of(head_products(hidden, head, dtype), head, dtype)
