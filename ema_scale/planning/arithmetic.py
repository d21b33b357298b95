"""How long a GPU computes in one optimizer step: multiplications, memory traffic between them, and kernel launches.

A share of the peak that is the same for all runs is wrong: with short rows launches decide, and on a GPU whose peak
grew faster than its memory the traffic does. The constants are fitted to published throughputs, which docs/plan.md
lists; a test holds the formulas to each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from ema_scale.models.flops import Flops
from ema_scale.planning.model_shapes import Shape
from ema_scale.planning.setup import Setup

MATMUL_SHARE = 0.77  # of the peak, which matrix products reach
# How often a layer's pass moves the width of each projection (inputs and outputs) through the GPU's memory between
# matrix products: norms, rotations, activations, residuals; and again for the projections that carry LoRA.
MOVED, MOVED_BY_LORA = 7.4, 7.2
LAUNCH_SECONDS = 1.3e-3  # of a layer's pass at the least: Python starts its kernels one by one
# Standard deviation of the logarithm of a row's tokens: 0.28 in rows of medical advice, 0.55 in those of legal advice.
SPREAD = 0.3


@dataclass(frozen=True)
class Work:
    """What one GPU computes, padding included.

    Args:
        flops: floating-point operations.
        moved: bytes through the GPU's memory between matrix products.
        passes: passes over a decoder layer; a backward counts as two.
    """

    flops: float
    moved: float
    passes: float

    def seconds(self, peak: float, bandwidth: float) -> tuple[float, float]:
        """What it takes by its tokens, and at the least by its launches: the longer of the two counts.

        Args:
            peak: FLOP/s.
            bandwidth: of the GPU's memory, bytes/s.
        """
        return self.flops / (peak * MATMUL_SHARE) + self.moved / bandwidth, self.passes * LAUNCH_SECONDS


def work_of(setup: Setup, world: int) -> Work:
    """Of one optimizer step on each of `world` GPUs."""
    tokens = setup.mean_in_a_batch * setup.accumulation * padding(setup, world)
    again = 1.0 if setup.checkpointing else 0.0
    policy, reference = 3.0 + again, _reference_runs(setup)
    other = setup.other or setup.shape
    adapted = setup.shape.targeted(None if setup.targets is None else list(setup.targets))
    own, theirs, lora = (
        shape.layers * sum(a + b for a, b in linears.values())
        for shape, linears in ((setup.shape, setup.shape.linears), (other, other.linears), (setup.shape, adapted))
    )
    widths = policy * (MOVED * own + MOVED_BY_LORA * lora) + reference * MOVED * theirs
    return Work(
        flops=tokens * flops_a_token(setup),
        moved=tokens * setup.precision.weights * widths,
        passes=setup.accumulation * (policy * setup.shape.layers + reference * other.layers),
    )


def padding(setup: Setup, world: int) -> float:
    """Positions computed for each token of a row.

    Rows have log-normal lengths. Those of a step are sorted by length and dealt to its micro-batches, and every GPU
    waits until the longest row of a micro-batch is done, its own or another's. No row is longer than `setup.tokens`.
    """
    together = setup.batch * world
    if setup.row_tokens >= setup.tokens or together * setup.accumulation == 1:
        return 1.0
    rows = together * setup.accumulation
    normal = NormalDist(-(SPREAD**2) / 2, SPREAD)  # of the logarithm of length / mean length
    # Blom's approximation of the expected order statistics.
    longest = [
        min(math.exp(normal.inv_cdf((last * together - 0.375) / (rows + 0.25))), setup.tokens / setup.row_tokens)
        for last in range(1, setup.accumulation + 1)
    ]
    return max(1.0, sum(longest) / len(longest))


def flops_a_token(setup: Setup) -> float:
    """FLOPs done for a trained token, recomputation and reference included.

    By the counts of models/flops.py: forward 2 N; backward 2 N for the gradient of the input, and none for frozen
    weights; LoRA's weights 6 of theirs in all; attention over all s positions behind a mask, which leaves nothing out,
    and over half of them without; every token is taken as one whose logits the loss needs. Checkpointing forms the
    layers again; the reference is a forward without LoRA, every step or with drift readings alone; a cached one is
    read.
    """
    policy = _flops(setup.shape, setup)
    again = policy.recomputed if setup.checkpointing else 0.0
    reads = 1.0 if setup.way else drift_share(setup)
    reference = _flops(setup.other or setup.shape, setup)
    return (
        policy.training
        + again
        + _reference_runs(setup) * (reference.base + reference.attention)
        + (reads * reference.head)
    )


def drift_share(setup: Setup) -> float:
    """The share of steps that run the reference for a drift reading alone."""
    return 1 / setup.drift_every if setup.drift_every else 0.0


def _reference_runs(setup: Setup) -> float:
    """Forwards of the reference per micro-batch."""
    return drift_share(setup) if setup.way in (None, "cached") else 1.0


def _flops(shape: Shape, setup: Setup) -> Flops:
    """Of a forward pass of one token."""
    return Flops(
        base=2.0 * shape.layers * shape.matrices,
        adapter=2.0 * setup.adapter,
        attention=4.0 * shape.layers * shape.attention * setup.row_tokens * (1.0 if setup.masked else 0.5),
        head=2.0 * shape.head,
    )
