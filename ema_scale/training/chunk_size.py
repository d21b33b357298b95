"""How many tokens the fused loss takes at once: what the memory of its [chunk, vocabulary] buffers has room for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ema_scale.defenses.terms import Direction, LabelMeasure

# Bytes of all [chunk, vocabulary] buffers. With the gradient and the chunk's hidden states this stays well under the
# 2 GB that the loss may take on a GPU. On a CPU a buffer is then about 16 MiB, near the size of the cache.
CUDA_BYTES, CPU_BYTES = 3 * 2**29, 80 * 2**20
# With fewer tokens per chunk, reading the head takes longer than multiplying with it.
MIN_CHUNK_TOKENS = 128
# Of the logits that are read at once on a CPU: with what is made of them they stay in a core's cache.
TILE_BYTES = 2**21
# Buffers of the cross-entropy: the policy's logits and probabilities, and their product for the entropy.
CROSS_ENTROPY = 3


def default_chunk(weight: Tensor, buffers: int = CROSS_ENTROPY) -> int:
    """Tokens per chunk for a head `weight` [V, H] and so many [chunk, vocabulary] buffers."""
    bytes_each = torch.promote_types(weight.dtype, torch.float32).itemsize
    return chunk_tokens(weight.shape[0], buffers, cuda=weight.device.type != "cpu", bytes_each=bytes_each)


def chunk_tokens(vocabulary: int, buffers: int, *, cuda: bool, bytes_each: int = 4) -> int:
    """Tokens per chunk, if so many [chunk, vocabulary] buffers of `bytes_each` bytes per element are alive at once."""
    return max(MIN_CHUNK_TOKENS, (CUDA_BYTES if cuda else CPU_BYTES) // (vocabulary * bytes_each * buffers))


def tile_tokens(weight: Tensor, dtype: torch.dtype) -> int:
    """Tokens of a chunk whose logits in `dtype` are read at once, for a head `weight` [V, H].

    A GPU reads the whole chunk. On a CPU a dozen passes over a whole chunk would each wait for the memory.
    """
    if weight.device.type != "cpu":
        return sys.maxsize
    return max(1, TILE_BYTES // (weight.shape[0] * dtype.itemsize))


class Measured(Protocol):
    """What of a term decides its memory."""

    @property
    def measure(self) -> Direction | LabelMeasure: ...
    @property
    def temperature(self) -> float: ...


def live_buffers(terms: Sequence[Measured] = (), *, slots: int = 1, weights_read: bool = False) -> int:
    """How many [chunk, vocabulary] buffers `fused_loss` with these terms holds at its highest point.

    slots: gradients that are formed apart (see `_ChunkedLoss`).
    weights_read: whether a factor on the cross-entropy reads the reference.
    """
    weights = CROSS_ENTROPY + weights_read
    return max([weights, *(_buffers_at(term, i, len(terms)) for i, term in enumerate(terms))]) + slots - 1


def _buffers_at(term: Measured, index: int, count: int) -> int:
    """Buffers alive while a term is computed: both logits, the policy's probabilities, the gradient of earlier terms,
    and what the term itself needs."""
    shared, last, heated = 3 + (index > 0), index == count - 1, term.temperature != 1.0
    if not isinstance(term.measure, str):
        return shared + 1  # the reference's probabilities
    if term.measure == "policy_reference":
        # A temporary, and the difference of the logits, which the last term writes over the reference's. At another
        # temperature the policy's probabilities again.
        return shared + 1 + heated + (not last)
    return shared + 2 + (not last) + heated  # the reference's probabilities stay
