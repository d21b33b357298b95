"""What the GPUs send one another in an optimizer step: weights gathered, gradients reduced."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ema_scale.planning.setup import Setup

DDP_BUCKET = 25 * 2**20  # torch's bucket_cap_mb

# All-gathers in one pass over a layer, counted under DeepSpeed on a CPU: 1.25 where layers are ZeRO-3's leaves
# (two_stream), 23 where each of its 21 matrices is fetched by itself.
LEAF_GATHERS, MODULE_GATHERS = 1, 21


@dataclass(frozen=True)
class Traffic:
    """Of one optimizer step. gathered, reduced: bytes of all shards together; a GPU takes in (G-1)/G of the first, and
    sends (G-1)/G of the second. calls: collectives of both."""

    gathered: float = 0.0
    gather_calls: float = 0.0
    reduced: float = 0.0
    reduce_calls: float = 0.0

    def into_a_gpu(self, world: int) -> tuple[float, float]:
        """(bytes gathered, bytes reduced) that each GPU takes part with."""
        return self.gathered * (world - 1) / world, self.reduced * (world - 1) / world


def traffic(setup: Setup, world: int) -> Traffic:
    """Of one optimizer step on `world` GPUs.

    DDP adds up the adapter's gradients once a step, by a ring twice round. ZeRO-1 and 2 scatter their sums and gather
    the new adapter. ZeRO-3 gathers every layer's weights twice for each micro-batch, for forward and for backward (the
    forward that checkpointing repeats is inside backward's), embeddings and head once; `two_stream`, `cached` and no
    reference at all are alike in this. A second forward (`adapter_off`) gathers layers and embeddings again, without
    the adapter; a second model (`separate`) all of itself once. Drift readings count with the share of steps that have
    them.
    """
    if world == 1:
        return Traffic()
    p, trained = setup.precision, setup.adapter
    if setup.zero < 3:
        if setup.zero == 0:
            size = p.adapter * trained
            return Traffic(0, 0, 2 * size, 2 * math.ceil(size / DDP_BUCKET))
        micro = setup.accumulation if setup.zero == 2 else 1
        return Traffic(p.weights * trained, 1, p.adapter * trained * micro, micro)
    shape = setup.shape
    layers = p.weights * (shape.layers * shape.layer + trained)
    head = p.weights * shape.head
    calls = shape.layers * (LEAF_GATHERS if setup.way == "two_stream" else MODULE_GATHERS)
    gathered, gathers = 2.0 * (layers + head), 2.0 * (calls + 1)
    if setup.way == "separate" and setup.other is not None:
        gathered += p.weights * setup.other.parameters
        gathers += setup.other.layers * MODULE_GATHERS + 2
    else:
        again = 1.0 if setup.way == "adapter_off" else drift_share(setup) if setup.way in (None, "cached") else 0.0
        gathered += again * (layers - p.weights * trained + head)
        gathers += again * (calls + 1)
    micro = setup.accumulation
    return Traffic(gathered * micro, gathers * micro, p.adapter * trained * micro, shape.layers * micro)


def drift_share(setup: Setup) -> float:
    """The share of steps that run the reference for a drift reading alone."""
    return 1 / setup.drift_every if setup.drift_every else 0.0
