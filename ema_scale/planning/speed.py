"""The hardware, and how long a step takes on it: arithmetic and communication."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from ema_scale.core.errors import UserError
from ema_scale.models.flops import peak_flops
from ema_scale.planning.arithmetic import drift_share, flops_a_token, work_of
from ema_scale.planning.memory import GIB, layer_input
from ema_scale.planning.setup import Setup


@dataclass(frozen=True)
class Device:
    """A kind of GPU. Peaks in FLOP/s (dense); links in bytes/s, to a GPU, one direction: inside a node, between nodes,
    from the machine's memory (host); bandwidth: of its own memory, bytes/s."""

    name: str
    bf16: float
    float32: float
    intra: float
    inter: float
    host: float
    bandwidth: float


# NVIDIA's data sheets; float32 without TF32, which torch does not use unless told to. Inside a node NCCL's own model
# counts on 360 GB/s of the 450 that NVLink has on Hopper (its constant nvlinkBws); the same 80 % of A100's 300, and of
# the network of a DGX, a card of 400 Gb/s (H100) or 200 Gb/s (A100) a GPU; and of PCIe's 64 (generation 5, H100) or 32
# (4, A100) GB/s to the machine's memory.
DEVICES = {
    "h100": Device("H100 SXM", peak_flops("H100") or 0, 67e12, 360e9, 40e9, 51e9, 3.35e12),
    "a100": Device("A100 SXM", peak_flops("A100") or 0, 19.5e12, 240e9, 20e9, 25e9, 2.0e12),
}


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus` GPUs with `memory` bytes each.

    Args:
        mfu: share of the peak that the rows' own tokens reach, recomputation included; None: by `arithmetic`.
        pace: measured time of the arithmetic over that of `arithmetic`.
        overlap: whether links work while the GPU computes; None: with all but ZeRO-3.
        intra_latency, inter_latency: seconds that a step of a ring takes inside a node and between nodes (NCCL's
            constants for its ring and simple protocol: 3.4 and 14 microseconds, hwLatencies in src/graph/tuning.cc).
    """

    gpus: int
    nodes: int
    memory: int
    device: Device
    mfu: float | None = None
    pace: float = 1.0
    overlap: bool | None = None
    intra_latency: float = 3.4e-6
    inter_latency: float = 14e-6

    @property
    def world(self) -> int:
        return self.gpus * self.nodes

    def at(self, gpus: int) -> Cluster:
        """The same machines, as many as hold `gpus` GPUs in all. Raises UserError if they do not fill nodes."""
        if gpus > self.gpus and gpus % self.gpus:
            raise UserError(f"--scale: found {gpus} GPUs, expected a multiple of the {self.gpus} that a node has")
        return replace(self, gpus=min(gpus, self.gpus), nodes=max(1, gpus // self.gpus))

    def gather_seconds(self, size: float, calls: float) -> float:
        """Seconds until every GPU has all `size` bytes, of which each holds a part, in `calls` collectives. The same
        holds for scattering sums.

        A ring (Patarasuk and Yuan 2009): every GPU takes in (G-1)/G of it over the node's links, and every node
        (n-1)/n of it over its network cards, of which each GPU has one; and a collective is G-1 steps, n-1 of them
        between nodes.
        """
        world, nodes = self.world, self.nodes
        inside = size * (world - 1) / world / self.device.intra
        between = size * (nodes - 1) / nodes / (self.device.inter * self.gpus)
        latency = (world - nodes) * self.intra_latency + (nodes - 1) * self.inter_latency
        return max(inside, between) + calls * latency


_MOST_GPUS, _MOST_GIB = 1_000_000, 10_000


def parse_gpus(text: str) -> tuple[int, int]:
    """`8x80GB` -> (8, bytes of memory of one), where a GB is 2^30 bytes, as on a GPU's label. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)\s*", text, re.IGNORECASE)
    if found is None or not 1 <= int(found[1]) <= _MOST_GPUS or not 0 < float(found[2]) <= _MOST_GIB:
        raise UserError(f"--gpus: found {text!r}, expected GPUs a node x memory of one, such as 8x80GB")
    return int(found[1]), int(float(found[2]) * GIB)


def parse_scale(text: str) -> list[int]:
    """`8-1024` -> 8, 16, 32, ... 1024; `8,24` -> 8, 24. Raises UserError."""
    doubled = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if doubled is not None:
        low, high = int(doubled[1]), int(doubled[2])
        found = []
        while 0 < low <= high:
            found.append(low)
            low *= 2
    else:
        found = [int(part) for part in text.split(",") if part.strip().isdecimal()]
        if len(found) != len(text.split(",")):
            found = []
    if not found or min(found) < 1 or max(found) > _MOST_GPUS:
        raise UserError(f"--scale: found {text!r}, expected numbers of GPUs, such as 8-1024 (doubling) or 8,64,512")
    return found


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step.

    Args:
        by_tokens: seconds of arithmetic, which grow with the tokens.
        least: seconds that starting its kernels takes, however few tokens there are.
        communication: seconds between GPUs, and between a GPU and its machine's memory.
        host: the latter part of them.
        overlapped: whether communication hides behind compute: the step takes the longer of the two, not their sum.
        tokens: of all GPUs, without padding.
        world: GPUs.
        reached: share of the peak that these tokens' operations reach while the GPU computes.
    """

    by_tokens: float
    least: float
    communication: float
    host: float
    overlapped: bool
    tokens: float
    world: int
    reached: float

    @property
    def compute(self) -> float:
        """Seconds of arithmetic."""
        return max(self.by_tokens, self.least)

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
        """Tokens per GPU below which communication takes longer, if neither's length per token changed; 0: never."""
        return (
            self.tokens / self.world * self.communication / self.by_tokens if self.communication > self.least else 0.0
        )


def speed(setup: Setup, cluster: Cluster) -> Speed:
    """Of one optimizer step on `cluster`: `setup.accumulation` micro-batches on every GPU.

    What waits in the machine's memory comes before it is gathered, so that both take their time one after the other.
    FSDP2 gathers ahead beside the arithmetic; of ZeRO-3 published steps show that it mostly does not (docs/plan.md).
    """
    tokens = setup.mean_in_a_batch * setup.accumulation
    peak = peak_of(setup, cluster)
    if cluster.mfu is not None:
        by_tokens, least = tokens * flops_a_token(setup) / (peak * cluster.mfu), 0.0
    else:
        found = work_of(setup, cluster.world).seconds(peak, cluster.device.bandwidth)
        by_tokens, least = (cluster.pace * seconds for seconds in found)
    sent = traffic(setup, cluster.world)
    host = sent.host / cluster.device.host
    communication = host + cluster.gather_seconds(sent.gathered, sent.gather_calls)
    communication += cluster.gather_seconds(sent.reduced, sent.reduce_calls)
    overlap = setup.zero != 3 if cluster.overlap is None else cluster.overlap
    reached = tokens * flops_a_token(setup) / (peak * max(by_tokens, least))
    return Speed(by_tokens, least, communication, host, overlap, tokens * cluster.world, cluster.world, reached)


def calibrated(setup: Setup, cluster: Cluster, measured: float) -> Cluster:
    """`cluster` with the pace at which one step takes `measured` seconds there.

    Raises UserError where communication alone is planned to take longer, or all arithmetic less than the peak allows.
    """
    planned = speed(setup, replace(cluster, pace=1.0))
    left = measured if planned.overlapped else measured - planned.communication
    found = f"--measured-step: found {measured:g} seconds"
    if left <= 0 or measured < planned.communication:
        raise UserError(
            f"{found}, but communication alone is planned to take {planned.communication:.3g}; measure on one GPU, or "
            "say how fast the links are: --intra-gbps, --inter-gbps, --host-gbps"
        )
    if planned.reached * planned.compute > left:
        raise UserError(
            f"{found}, which takes more than the peak of {cluster.device.name}; say which GPU it was (--device, "
            "--tflops), and give the rows' mean length (--row-tokens)"
        )
    return replace(cluster, pace=left / planned.compute)


def peak_of(setup: Setup, cluster: Cluster) -> float:
    """FLOP/s in the dtype of the weights."""
    return cluster.device.float32 if setup.precision.weights == 4 else cluster.device.bf16


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
