"""Bytes that one GPU needs at the highest point of a step, line by line.

The lines marked `measured` are held against what torch's allocator really gives out, on small models of the same
layers: `ema bench plan`, docs/plan.md. The others (what CUDA, NCCL and DDP take, and what an allocator wastes) are
allowances, stated as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ema_scale.planning.setup import Setup
from ema_scale.training.chunk_size import CROSS_ENTROPY, chunk_tokens

GIB = 2**30

# The CUDA context with its kernels, cuBLAS's workspaces, what the driver keeps of the label's memory; NCCL's channels.
CUDA_CONTEXT = int(1.5 * GIB)
NCCL = int(0.5 * GIB)
# Of what torch's allocator gives out, more that it must hold, since free pieces do not fit.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class MemoryLine:
    """One part of the memory, in bytes. measured: whether a test holds it against torch's allocator."""

    name: str
    bytes: float
    measured: bool = True


def memory(setup: Setup, world: int = 1, *, cuda: bool = True) -> list[MemoryLine]:
    """The parts that are held at the highest point of a step; they add up to the peak.

    A step is highest at one of two points: in the loss, where all stored activations and a chunk of logits are
    there; or where backward begins, where there are the same activations and the gradients of one layer (with
    checkpointing also that layer's activations, formed again). Where weights are sharded, the head and a layer are
    whole at these points, and a third one is where a layer has just been gathered. world: processes. cuda: with the
    allowances for a GPU.
    """
    held = _held(setup, world)
    hidden = setup.in_a_batch * setup.shape.hidden
    b = setup.precision.weights
    reference = MemoryLine("reference's states", hidden * b * (setup.reads_reference + setup.states))
    a_layer = layer_input(setup) if setup.checkpointing else layer_activations(setup)
    stored = [] if setup.offload else [MemoryLine("stored activations", setup.shape.layers * a_layer)]
    loss = [
        # The final norm keeps float32; its output, and the gradient that the loss forms of it, are the model's.
        MemoryLine("last hidden states", hidden * (4 + 2 * b)),
        MemoryLine("logits chunk", logits_chunk(setup, cuda=cuda)),
    ]
    backward = [MemoryLine("gradients of a layer's activations", backward_transients(setup))]
    if setup.checkpointing:
        backward.insert(0, MemoryLine("one layer formed again", layer_activations(setup)))
    points = [loss, backward]
    if setup.sharded and (world > 1 or setup.weights_away):
        whole = one_layer(setup)
        kept = _kept(setup, whole)
        loss.append(MemoryLine("gathered weights", kept + setup.shape.head * b))
        # A layer comes flat, and is copied into its parameters; with FSDP2 the next one does while this one runs.
        backward.append(MemoryLine("gathered weights", kept + whole * (2 if setup.fsdp else 1)))
        arriving = MemoryLine("gathered weights", kept + 2 * whole)
        points.append([arriving, MemoryLine("gradient of a layer's output", layer_input(setup))])
    highest = max(points, key=lambda lines: sum(line.bytes for line in lines))
    lines = [*held, *stored, reference, *highest]
    if cuda:
        allocated = sum(line.bytes for line in lines)
        lines += [
            MemoryLine("fragmentation", FRAGMENTATION * allocated, measured=False),
            MemoryLine("CUDA context", CUDA_CONTEXT, measured=False),
        ]
        if world > 1:
            lines.append(MemoryLine("NCCL", NCCL, measured=False))
    return [line for line in lines if line.bytes]


def host_memory(setup: Setup, processes: int, world: int) -> list[MemoryLine]:
    """Bytes that a node's own memory must hold for its `processes`; the operating system and file caches come on top.

    What ZeRO's offload puts there (gradients in float32), the layers' inputs with activation offload, and without
    ZeRO-3, which loads in parts, the whole base that every process first loads.
    """
    p, trained, shape = setup.precision, setup.adapter, setup.shape
    lines = []
    if setup.weights_away:
        weights = shape.parameters + (setup.other.parameters if setup.other else 0)
        lines.append(MemoryLine("weights and adapter", processes * (p.weights * weights + p.adapter * trained) / world))
    if setup.optimizer_away:
        lines.append(
            MemoryLine("optimizer and gradients", processes * (setup.optimizer + p.master + 4) * trained / world)
        )
    if setup.offload:
        lines.append(MemoryLine("layers' inputs", processes * shape.layers * layer_input(setup)))
    if setup.zero < 3:
        lines.append(MemoryLine("every process's whole base, while it loads", processes * p.weights * shape.parameters))
    return lines


def total(lines: list[MemoryLine]) -> float:
    return sum(line.bytes for line in lines)


def _held(setup: Setup, world: int) -> list[MemoryLine]:
    """What is there all the time: ZeRO-1 shards the optimizer, 2 the gradients too, 3 and FSDP2 also the weights
    (Rajbhandari et al., arXiv 1910.02054), of which a part may wait in the machine's memory."""
    p, trained = setup.precision, setup.adapter
    parts = [world if setup.fsdp or setup.zero >= stage else 1 for stage in (1, 2, 3)]
    lines = [
        MemoryLine("frozen weights", 0 if setup.weights_away else p.weights * setup.shape.parameters / parts[2]),
        MemoryLine(
            "second model",
            0 if setup.weights_away or not setup.other else p.weights * setup.other.parameters / parts[2],
        ),
        MemoryLine("adapter", (0 if setup.weights_away else p.adapter * trained / parts[2]) + p.cast * trained),
        MemoryLine("gradients", 0 if setup.optimizer_away else p.adapter * trained / parts[1]),
        MemoryLine("optimizer", 0 if setup.optimizer_away else (setup.optimizer + p.master) * trained / parts[0]),
    ]
    if setup.fsdp and setup.accumulation > 1:
        lines.append(MemoryLine("gradients of all parts", p.adapter * trained))  # which are reduced at the step's end
    if setup.zero == 3:
        lines.append(MemoryLine("bucket", p.weights * setup.bucket))
    elif world > 1 and not setup.fsdp:
        # DDP's are a second copy of the gradients; ZeRO-2's are two.
        buckets = p.adapter * trained if setup.zero < 2 else 2 * p.weights * setup.bucket
        lines.append(MemoryLine("buckets", buckets, measured=False))
    return lines


def layer_input(setup: Setup) -> float:
    """Bytes that gradient checkpointing stores of a layer: its input [B, T, H]."""
    return setup.in_a_batch * setup.shape.hidden * setup.precision.weights


def layer_activations(setup: Setup) -> float:
    """Bytes that autograd stores of one decoder layer with frozen weights and LoRA, for a micro-batch of N tokens.

    After Korthikanti et al. (arXiv 2205.05198, equation 1), for other layers: a frozen projection stores nothing, since
    only its input's gradient is needed. With b bytes a hidden state, H hidden, A attention's and I the MLP's width:

    - two RMSNorms, computed in float32: 2 x 4 H
    - attention's q, k, v (k and v repeated for all heads) and output: 4 A b, 4 bytes a head, and its mask, T b
    - the MLP: gate, its SiLU, up: 3 I b
    - the input of every LoRA module: stored once where modules share it (the norms' outputs; attention's output is
      there already), H b for q, k, v, H b for gate, up and I b for down; else a copy each, in `Precision.copies` bytes
    - LoRA's middle, r elements a module, in the dtype that LoRA is computed in
    """
    shape, p = setup.shape, setup.precision
    b = p.weights
    targets = shape.targeted(None if setup.targets is None else list(setup.targets))
    if p.copies:
        inputs = p.copies * sum(size for size, _ in targets.values())
    else:
        shared = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
        inputs = b * shape.hidden * sum(bool(group & set(targets)) for group in shared)
        inputs += b * shape.intermediate * ("down_proj" in targets)
    lora = (p.copies or p.adapter) * setup.rank * len(targets)
    mask = setup.tokens * b if setup.masked else 0
    token = 8 * shape.hidden + 4 * shape.attention * b + 4 * shape.heads + mask + 3 * shape.intermediate * b
    return setup.in_a_batch * (token + inputs + lora)


def backward_transients(setup: Setup) -> float:
    """Bytes of gradients at the start of a layer's backward: of its output (and what is added to it), and of the MLP's
    width, one in the base's dtype and one in LoRA's, before they are added."""
    shape, p = setup.shape, setup.precision
    return setup.in_a_batch * (2 * shape.hidden * p.weights + shape.intermediate * (p.weights + p.adapter))


def logits_chunk(setup: Setup, *, cuda: bool = True) -> float:
    """Bytes of the float32 buffers of one chunk of the fused loss: of `training.chunks`' size, or all there is."""
    learned = math.ceil(setup.learned * setup.in_a_batch)
    # Tokens that only a divergence looks at come in chunks of their own.
    others = setup.in_a_batch - learned if setup.buffers > CROSS_ENTROPY else 0
    rows = min(chunk_tokens(setup.shape.vocab, setup.buffers, cuda=cuda), max(learned, others))
    return 4 * rows * setup.shape.vocab * setup.buffers


def one_layer(setup: Setup) -> float:
    """Bytes of one decoder layer with its adapter."""
    return setup.precision.weights * setup.shape.layer + setup.precision.adapter * setup.adapter / setup.shape.layers


def _kept(setup: Setup, whole: float) -> float:
    """Bytes of other layers that are there beside the one that runs: by ZeRO-3 what is soon used again or fetched
    ahead (an upper bound: the run decides), by FSDP2 the one fetched ahead."""
    others = (setup.shape.layers - 1) * whole
    return min(whole if setup.fsdp else setup.precision.weights * setup.live, others)
