"""How long a step takes: its arithmetic over an assumed part of the GPU's peak, against its communication."""

from __future__ import annotations

from dataclasses import dataclass

from ema_scale.planning.cluster import Cluster
from ema_scale.planning.setup import Setup
from ema_scale.planning.shapes import Shape
from ema_scale.planning.traffic import drift_share, traffic
from ema_scale.training.flops import Flops


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step; seconds, and tokens of all GPUs. communication: between GPUs, and, of which it is a part,
    host: between a GPU and its machine's memory. overlapped: whether it hides behind compute, so that the step takes
    the longer of the two and not their sum."""

    compute: float
    communication: float
    host: float
    overlapped: bool
    tokens: float
    world: int

    @property
    def step(self) -> float:
        both = (self.compute, self.communication)
        return max(both) if self.overlapped else sum(both)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def tokens_per_second_a_gpu(self) -> float:
        return self.tokens_per_second / self.world

    @property
    def communication_rules(self) -> bool:
        """Whether communication takes longer than arithmetic."""
        return self.communication > self.compute

    @property
    def break_even_tokens(self) -> float:
        """Tokens a GPU a micro-batch below which communication takes longer, if neither's length per token changed."""
        return self.tokens / self.world * self.communication / self.compute


def flops_a_token(setup: Setup) -> float:
    """FLOPs done for a trained token, recomputation and reference included.

    By the counts of training/flops.py: forward 2 N; backward 2 N for the gradient of the input, and none for frozen
    weights; LoRA's weights 6 of theirs in all; attention over all s positions, since a mask leaves nothing out; every
    token is taken as one whose logits the loss needs. Checkpointing forms the layers again; the reference is a forward
    without LoRA, every step or with drift readings alone; a cached one is read.
    """
    policy = _flops(setup.shape, setup)
    again = policy.recomputed if setup.checkpointing else 0.0
    reads = 1.0 if setup.way else drift_share(setup)
    reference = _flops(setup.other or setup.shape, setup)
    runs = drift_share(setup) if setup.way == "cached" else 1.0
    return policy.training + again + reads * (runs * (reference.base + reference.attention) + reference.head)


def _flops(shape: Shape, setup: Setup) -> Flops:
    """Of a forward pass of one token."""
    return Flops(
        base=2.0 * shape.layers * shape.matrices,
        adapter=2.0 * setup.adapter,
        attention=4.0 * shape.layers * shape.attention * setup.row_tokens,
        head=2.0 * shape.head,
    )


def speed(setup: Setup, cluster: Cluster) -> Speed:
    """Of one optimizer step on `cluster`: `setup.accumulation` micro-batches on every GPU.

    What waits in the machine's memory comes before it is gathered, so that both take their time one after the other.
    A second forward hides as well as the first: DeepSpeed records the order of a whole step, both forwards in it, and
    FSDP2 gathers ahead by streams.
    """
    tokens = setup.mean_in_a_batch * setup.accumulation
    peak = cluster.device.float32 if setup.precision.weights == 4 else cluster.device.bf16
    compute = tokens * flops_a_token(setup) / (peak * cluster.mfu)
    sent = traffic(setup, cluster.world)
    host = sent.host / cluster.device.host
    communication = host + cluster.gather_seconds(sent.gathered, sent.gather_calls)
    communication += cluster.gather_seconds(sent.reduced, sent.reduce_calls)
    return Speed(compute, communication, host, cluster.overlap, tokens * cluster.world, cluster.world)
