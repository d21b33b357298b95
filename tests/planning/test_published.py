"""The plan's times against throughputs that others published. docs/plan.md lists the sources and the tolerances."""

from dataclasses import replace

import pytest

from ema_scale.planning.arithmetic import MOVED, SPREAD, Work, flops_a_token, padding
from ema_scale.planning.memory import GIB
from ema_scale.planning.model_shapes import PUBLISHED, Shape, from_config
from ema_scale.planning.setup import AUTOCAST, DEEPSPEED, Setup
from ema_scale.planning.speed import DEVICES, Cluster, speed

A100, H100 = DEVICES["a100"], DEVICES["h100"]
L40S = replace(A100, name="L40S", bf16=362e12, bandwidth=0.864e12)
HBM2E = replace(H100, name="H100 with 96 GB of HBM2e", bandwidth=2.4e12)


def qwen(layers, hidden, intermediate):
    """Qwen 1, whose c_attn is q, k and v together."""
    heads = hidden // 128
    return Shape("qwen", layers, hidden, intermediate, heads, heads, 128, 151936, False)


QWEN = {
    "1.8B": qwen(24, 2048, 5504), "7B": qwen(32, 4096, 11008), "14B": qwen(40, 5120, 13696),
    "72B": qwen(80, 8192, 24576),
}  # fmt: skip
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
# QwenLM/Qwen, README.md, "Profiling of Memory and Speed": LoRA with checkpointing on A100 SXM 80 GB, one row per
# micro-batch, 8 accumulated; seconds per step by row length. finetune.py adapts c_attn, attn.c_proj, w1 and w2, r=64.
QWEN_LORA = {
    "1.8B": (1.0, 1.0, 1.1, 1.7, 3.3, 6.8),
    "7B": (1.2, 1.5, 2.8, 5.2, 10.1, 21.3),
    "14B": (1.6, 2.4, 4.4, 8.4, 17.0, 36.0),
}
# The same with DeepSpeed ZeRO-3 on four GPUs of a node.
QWEN_ZERO3 = (17.6, 20.5, 29.4, 45.7, 83.4, 161.5)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")


def lora(shape, tokens, *, batch=1, accumulation=8, checkpointing=True, rank=64, targets=TARGETS, **more):
    longest = more.pop("longest", tokens)
    settings = {"precision": AUTOCAST, "masked": False, **more}
    return Setup(shape, batch, longest, tokens, accumulation, checkpointing, rank, targets, **settings)


def off(planned, published):
    return planned / published - 1


@pytest.mark.parametrize("size", QWEN_LORA)
def test_lora_with_rows_of_every_length_within_15_percent(size):
    one = Cluster(1, 1, 80 * GIB, A100)
    planned = [speed(lora(QWEN[size], tokens), one).step for tokens in LENGTHS]
    assert [abs(off(p, m)) < 0.15 for p, m in zip(planned, QWEN_LORA[size], strict=True)] == [True] * 6, planned


def test_lora_under_zero3_within_31_percent():
    four = Cluster(4, 1, 80 * GIB, A100)
    sharded = [lora(QWEN["72B"], tokens, zero=3, precision=DEEPSPEED) for tokens in LENGTHS]
    planned = [speed(setup, four) for setup in sharded]
    assert all(abs(off(p.step, m)) < 0.31 for p, m in zip(planned, QWEN_ZERO3, strict=True)), planned
    # Had communication been hidden, the short rows would have taken less than half of what they took.
    hidden = speed(sharded[0], replace(four, overlap=True))
    assert not planned[0].overlapped and hidden.step < QWEN_ZERO3[0] / 2


def test_short_padded_rows_within_20_percent():
    # huggingface/peft, method_comparison/MetaMathQA/results/lora--llama-3.2-3B-rank32.json: 4,198,051 tokens in 5,000
    # steps of 4 padded rows, 6,776 tokens per second on one L40S, q_proj and v_proj.
    shape = from_config("3b", PUBLISHED["llama-3.2-3b"])
    setup = lora(shape, 210, batch=4, accumulation=1, checkpointing=False, rank=32, longest=768, masked=True,
                 targets=("q_proj", "v_proj"))  # fmt: skip
    found = speed(setup, Cluster(1, 1, 48 * GIB, L40S))
    assert abs(off(found.tokens_per_second, 6776)) < 0.2
    assert 6776 * flops_a_token(setup) / L40S.bf16 == pytest.approx(0.24, abs=0.02)  # of the peak, which 40 is not


def test_packed_lora_of_70b_on_8_gpus_within_15_percent():
    # pytorch/torchtune, README.md, "Memory and training speed" (October 2024): 3,497 tokens per second on 8 A100, two
    # packed rows of 2,048 tokens per GPU, compiled; recipes/configs/llama3_1/70B_lora.yaml.
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    shape = from_config("70b", PUBLISHED["llama-3.1-70b"])
    setup = lora(shape, 2048, batch=2, accumulation=1, rank=16, targets=targets, fsdp=True, masked=True)
    assert abs(off(speed(setup, Cluster(8, 1, 80 * GIB, A100)).tokens_per_second, 3497)) < 0.15


def full_training(shape, projections, cluster, tokens, context, checkpointing=False):
    """Tokens per second and GPU of training all weights under FSDP, by the same constants and links.

    Forward, and two gradients; weights gathered twice in bfloat16, gradients reduced in float32.
    """
    matrices = sum(a * b for a, b in projections)
    forward = 2 * (shape.layers * matrices + shape.head) + 4 * shape.layers * shape.attention * context
    again = forward - 2 * shape.head if checkpointing else 0
    passes = shape.layers * (4 if checkpointing else 3)
    moved = 2 * passes * MOVED * sum(a + b for a, b in projections)
    work = Work(tokens * (3 * forward + again), tokens * moved, passes)
    weights = shape.layers * matrices + 2 * shape.head
    sent = cluster.gather_seconds(2 * 2 * weights, 2 * shape.layers) + cluster.gather_seconds(4 * weights, shape.layers)
    return tokens / max(*work.seconds(cluster.device.bf16, cluster.device.bandwidth), sent)


LLAMA = from_config("8b", PUBLISHED["llama-3.1-8b"])


def llama(cluster, tokens=16384, context=4096):
    return full_training(LLAMA, LLAMA.linears.values(), cluster, tokens, context)


def mpt(layers, hidden, cluster, batch, context=2048, checkpointing=False):
    shape = Shape("mpt", layers, hidden, 4 * hidden, hidden // 128, hidden // 128, 128, 50368, True)
    projections = [(hidden, hidden)] * 4 + [(hidden, 4 * hidden), (4 * hidden, hidden)]
    return full_training(shape, projections, cluster, batch * context, context / 2, checkpointing)


# mosaicml/llm-foundry, scripts/train/benchmarking/README.md: layers, width, rows per micro-batch, checkpointing, GPUs,
# tokens per second and GPU.
MPT = [
    (H100, 24, 2048, 14, False, 8, 45455), (H100, 32, 2560, 10, False, 16, 24142), (H100, 32, 4096, 6, False, 8, 10643),
    (H100, 40, 5120, 2, False, 8, 4792), (H100, 48, 7168, 3, True, 8, 2002), (H100, 40, 5120, 2, False, 64, 4800),
    (A100, 24, 2048, 14, False, 8, 20513), (A100, 32, 2560, 10, False, 8, 10811), (A100, 32, 4096, 6, False, 8, 4641),
    (A100, 40, 5120, 2, False, 8, 2262), (A100, 48, 7168, 3, True, 8, 916),
]  # fmt: skip


@pytest.mark.parametrize(("device", "layers", "hidden", "batch", "checkpointing", "gpus", "published"), MPT)
def test_training_of_all_weights_within_40_percent(device, layers, hidden, batch, checkpointing, gpus, published):
    cluster = Cluster(8, gpus // 8, 80 * GIB, device)
    assert abs(off(mpt(layers, hidden, cluster, batch, checkpointing=checkpointing), published)) < 0.4


def test_scaling_to_2048_gpus_within_10_percent():
    # pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: Llama 3.1 8B, FSDP2, two rows of 8,192 tokens per
    # GPU: 5,762 tokens per second and GPU on 8, 5,605 on 128.
    # With 500 of 700 watts these GPUs took half as long again as planned.
    eight = Cluster(8, 1, 96 * GIB, HBM2E)
    assert 0 < off(llama(eight), 5762) < 0.5
    assert llama(replace(eight, nodes=16)) / llama(eight) == pytest.approx(5605 / 5762, rel=0.05)
    # llm-foundry, 3B with 6 rows of 2,048 tokens per GPU: 23,021 on 32 GPUs, 22,525 on 64.
    nodes = [mpt(32, 2560, Cluster(8, count, 80 * GIB, H100), 6) for count in (4, 8)]
    assert nodes[1] / nodes[0] == pytest.approx(22525 / 23021, rel=0.05)
    # arXiv 2411.13055: Llama 2 7B under FSDP, 37 % less per GPU on 2,048 H100 than on 128; two rows of 4,096.
    seven = Shape("llama-2", 32, 4096, 11008, 32, 32, 128, 32000, False)
    many = [
        full_training(seven, seven.linears.values(), Cluster(8, count, 80 * GIB, H100), 8192, 2048)
        for count in (16, 256)
    ]
    assert many[1] / many[0] == pytest.approx(1 - 0.3722, rel=0.1)


def test_what_short_padded_rows_reach_of_an_h100():
    """25 to 30 % of the peak, not 40."""
    shape = from_config("7b", PUBLISHED["qwen2.5-7b"])
    padded = Setup(shape, 4, 2048, 400, 4, True, 32, None, AUTOCAST, way="adapter_off", drift_every=10, buffers=4)
    eight = Cluster(8, 1, 80 * GIB, H100)
    assert 0.25 < speed(padded, eight).reached < 0.30
    packed = replace(padded, row_tokens=2048)
    assert padding(packed, 8) == 1 and speed(packed, eight).reached > 0.3
    # More GPUs wait for longer rows, but none for a row that is longer than data.max_length.
    waits = [padding(padded, world) for world in (1, 8, 64, 1024)]
    assert waits == sorted(waits) and 1 < waits[0] and waits[-1] < 2048 / 400
    assert padding(replace(padded, tokens=420), 1024) <= 1.05


@pytest.mark.parametrize(("processes", "counted"), [(1, 0.11), (4, 0.18)])
def test_padding_is_that_of_counted_batches(processes, counted):
    from benchmarks.padding import INSIDE, draw_lengths, padding_shares

    lengths = draw_lengths(4000, 240, SPREAD, 2048)
    share = padding_shares(lengths, 4, 4, processes)[INSIDE]
    setup = Setup(LLAMA, 4, 2048, sum(lengths) / len(lengths), 4, True, 32, None, AUTOCAST)
    assert share == pytest.approx(counted, abs=0.01)
    assert 1 - 1 / padding(setup, processes) == pytest.approx(share, abs=0.02)
