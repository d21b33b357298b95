"""How long a step takes: its arithmetic over an assumed part of the GPU's peak, against its communication."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ema_scale.models.flops import Flops
from ema_scale.planning.hardware import Cluster
from ema_scale.planning.memory import layer_input
from ema_scale.planning.model_shapes import Shape
from ema_scale.planning.setup import Setup


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


DDP_BUCKET = 25 * 2**20  # torch's bucket_cap_mb


@dataclass(frozen=True)
class Traffic:
    """Of one optimizer step. gathered, reduced: bytes of all shards together; a GPU takes in (G-1)/G of the first, and
    sends (G-1)/G of the second. calls: collectives of both. host: bytes between a GPU and its machine's memory."""

    gathered: float = 0.0
    gather_calls: float = 0.0
    reduced: float = 0.0
    reduce_calls: float = 0.0
    host: float = 0.0

    def into_a_gpu(self, world: int) -> tuple[float, float]:
        """(bytes gathered, bytes reduced) that each GPU takes part with."""
        return self.gathered * (world - 1) / world, self.reduced * (world - 1) / world


def traffic(setup: Setup, world: int) -> Traffic:
    """Of one optimizer step on `world` GPUs.

    DDP adds up the adapter's gradients once a step, by a ring twice round. ZeRO-1 and 2 scatter their sums and gather
    the new adapter. ZeRO-3 scatters them for each micro-batch, FSDP2 once a step, in float32; what both gather:
    `a_micro_batch`. A shard that waits in the machine's memory crosses to its GPU whenever it is gathered.
    """
    p, trained, micro = setup.precision, setup.adapter, setup.accumulation
    size, calls = a_micro_batch(setup) if setup.sharded else (0.0, 0.0)
    host = micro * size / world if setup.weights_away else 0.0
    if setup.optimizer_away:  # gradients there, the new adapter back
        host += (micro + 1) * p.adapter * trained / world
    if setup.offload:
        host += 2 * micro * setup.shape.layers * layer_input(setup)
    if world == 1:
        return Traffic(host=host)
    if setup.sharded:
        times = 1 if setup.fsdp else micro
        of_adapter = 4 if setup.fsdp else p.adapter
        return Traffic(
            size * micro, calls * micro, of_adapter * trained * times, float(setup.shape.layers * times), host
        )
    if setup.zero == 0:
        summed = p.adapter * trained
        return Traffic(0, 0, 2 * summed, 2 * math.ceil(summed / DDP_BUCKET), host)
    times = micro if setup.zero == 2 else 1
    return Traffic(p.weights * trained, 1, p.adapter * trained * times, times, host)


def a_micro_batch(setup: Setup) -> tuple[float, float]:
    """(bytes gathered, all-gathers) of one micro-batch under ZeRO-3 or FSDP2, of which a GPU's own shard is a part.

    As counted in real steps (`ema bench reference`, which a test holds this against): every decoder layer is gathered
    whole, with its adapter, once for the forward and once for the backward; a forward that checkpointing repeats is
    inside the backward's. The head is gathered once, for the loss. The embeddings are gathered for the forward and,
    by ZeRO-3 with checkpointing and by FSDP2's fetching ahead always, for the backward; the final norm by ZeRO-3 for
    both, by FSDP2 once. `two_stream`, `cached` and no reference at all are alike.

    A second forward (`adapter_off`; drift readings, with their share of the steps, where no reference or a cached one
    runs) gathers embeddings, layers and norm again; with checkpointing FSDP2, fetching ahead, gathers one layer in
    vain. A second model (`separate`) gathers itself once, its head by itself, which FSDP2 also gathers with its norm
    and embeddings.
    """
    shape, b = setup.shape, setup.precision.weights
    layers = b * shape.layers * shape.layer + setup.precision.adapter * setup.adapter
    head, norm = b * shape.head, b * shape.hidden
    embeddings, norms = (2, 1) if setup.fsdp else (1 + setup.checkpointing, 2)
    size, calls = 2.0 * layers + (1 + embeddings) * head + norms * norm, 2.0 * shape.layers + 1 + embeddings + norms
    if setup.way == "separate" and setup.other is not None:
        other = setup.other
        size += b * (other.layers * other.layer + other.hidden + (3 if setup.fsdp else 2) * other.head)
        return size, calls + other.layers + 2
    again = 1.0 if setup.way == "adapter_off" else drift_share(setup) if setup.way in (None, "cached") else 0.0
    vain = setup.fsdp and setup.checkpointing
    size += again * (layers * (1 + vain / shape.layers) + head + norm * (not setup.fsdp))
    calls += again * (shape.layers + vain + (1 if setup.fsdp else 2))
    return size, calls


def drift_share(setup: Setup) -> float:
    """The share of steps that run the reference for a drift reading alone."""
    return 1 / setup.drift_every if setup.drift_every else 0.0
