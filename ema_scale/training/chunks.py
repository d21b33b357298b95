"""How many tokens the fused loss takes at once, and what that holds: without torch, so that plans can ask, too.

The memory of a chunk is a number of [chunk, vocabulary] buffers, which depends on the terms; so the chunk is what a
budget of bytes has room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# With the gradient and the chunk's hidden states, well under the 2 GB that the loss may take on a GPU. On a CPU a
# buffer is then about 16 MiB, near the cache.
CUDA_BYTES, CPU_BYTES = 3 * 2**29, 80 * 2**20
# Below so many tokens, reading the head once a chunk takes longer than multiplying with it.
FEWEST = 128
# Policy's logits and probabilities, and their product for the entropy.
CROSS_ENTROPY = 3


class Asked(Protocol):
    """What of a divergence decides."""

    @property
    def direction(self) -> str: ...
    @property
    def temperature(self) -> float: ...


def live_buffers(terms: Sequence[Asked] = ()) -> int:
    """[chunk, vocabulary] buffers at the highest point of `fused_loss` with these terms, besides cross-entropy."""
    return max([CROSS_ENTROPY, *(_held(term, i, len(terms)) for i, term in enumerate(terms))])


def chunk_tokens(vocabulary: int, buffers: int, *, cuda: bool, bytes_each: int = 4) -> int:
    """Tokens a chunk. bytes_each: of a buffer's elements."""
    return max(FEWEST, (CUDA_BYTES if cuda else CPU_BYTES) // (vocabulary * bytes_each * buffers))


def _held(term: Asked, index: int, count: int) -> int:
    """Both streams' logits and the policy's probabilities; what earlier terms have left of the gradient; then what the
    term itself needs."""
    held, last, heated = 3 + (index > 0), index == count - 1, term.temperature != 1.0
    if term.direction == "ceiling":
        return held + 1  # the reference's probabilities
    if term.direction == "policy_reference":
        # A temporary, and log p - log q, which the last term puts where the reference's logits are; at another
        # temperature both streams' probabilities, and the logits that these are made of.
        return held + (3 if heated else 1 + (not last))
    return held + 2 + (not last) + heated  # the reference's probabilities stay
