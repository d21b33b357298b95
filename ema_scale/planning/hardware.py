"""The machines that a plan is for: their memory, arithmetic and links, all of them assumptions that options replace."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ema_scale.core.errors import UserError
from ema_scale.models.flops import peak_flops

GIB = 2**30


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

    mfu: the part of the peak that is reached over all arithmetic done, recomputation included; 0.4 is an assumption:
    nothing here was measured on a GPU. overlap: links work while the GPU computes. intra_latency, inter_latency:
    seconds that a step of a ring takes inside a node and between nodes (NCCL's constants for its ring and simple
    protocol: 3.4 and 14 microseconds, hwLatencies in its src/graph/tuning.cc).
    """

    gpus: int
    nodes: int
    memory: int
    device: Device
    mfu: float = 0.4
    overlap: bool = True
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


def parse_gpus(text: str) -> tuple[int, int]:
    """`8x80GB` -> (8, bytes of memory of one), where a GB is 2^30 bytes, as on a GPU's label. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)\s*", text, re.IGNORECASE)
    if found is None or int(found[1]) == 0 or float(found[2]) == 0:
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
        found = [int(part) for part in text.split(",") if part.strip().isdigit()]
        if len(found) != len(text.split(",")):
            found = []
    if not found or min(found) < 1:
        raise UserError(f"--scale: found {text!r}, expected numbers of GPUs, such as 8-1024 (doubling) or 8,64,512")
    return found
