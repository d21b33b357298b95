"""GPU time of sampling and judging: one case by hand, and what it rises with."""

from dataclasses import replace

import pytest

from ema_scale.planning.eval_cost import (
    BANDWIDTH_SHARE,
    SEQUENCES,
    STEP_SECONDS,
    EngineWork,
    EvaluationWork,
    gpu_seconds,
    served,
)
from ema_scale.planning.memory import GIB
from ema_scale.planning.model_shapes import PUBLISHED, from_config
from ema_scale.planning.speed import DEVICES, Cluster

SEVEN = from_config("7b", PUBLISHED["qwen2.5-7b"])
NODE = Cluster(8, 1, 80 * GIB, DEVICES["h100"])
ENGINE = EngineWork("sampling", "Qwen/Qwen2.5-7B-Instruct")
WORK = EvaluationWork(10_000, 10_000 * 100.0, 1000.0, 10_000 * 200.0)


def test_writing_by_hand():
    weights = 28 * SEVEN.matrices + SEVEN.head
    # 256 answers of 100 + 100 positions each: keys and values of 4 heads of 128 in 28 layers.
    step = (2 * weights + SEQUENCES * 200 * 4 * 28 * 4 * 128) / (3.35e12 * BANDWIDTH_SHARE)
    arithmetic = 2 * weights / (DEVICES["h100"].bf16 * 0.4)
    assert gpu_seconds(SEVEN, ENGINE, WORK, NODE) == pytest.approx(2e6 / SEQUENCES * step + 1000 * arithmetic)
    fast = replace(NODE, device=replace(NODE.device, bandwidth=1e15, bf16=1e17))
    least = gpu_seconds(SEVEN, ENGINE, WORK, fast)
    assert least == pytest.approx(2e6 / SEQUENCES * STEP_SECONDS, rel=0.01)
    assert gpu_seconds(SEVEN, replace(ENGINE, gpus=4), WORK, fast) == pytest.approx(4 * least, rel=0.01)
    # A judge reads much and writes little: arithmetic.
    read = EvaluationWork(1000, 1e6, 1e6, 5000.0)
    assert gpu_seconds(SEVEN, ENGINE, read, NODE) == pytest.approx(1e6 * arithmetic, rel=0.05)


def test_memory_decides_how_many_are_written_at_once():
    tight = replace(NODE, memory=18 * GIB)
    assert gpu_seconds(SEVEN, ENGINE, WORK, tight) > 1.5 * gpu_seconds(SEVEN, ENGINE, WORK, NODE)
    assert gpu_seconds(SEVEN, ENGINE, EvaluationWork(0, 0.0, 0.0, 0.0), NODE) == 0


def test_a_model_that_fits_no_gpu_has_no_time():
    large = EngineWork("sampling", "Qwen/Qwen2.5-72B-Instruct")
    (alone,), (shared,) = (served({engine: WORK}, NODE) for engine in (large, replace(large, gpus=4)))
    assert alone.seconds is None and "set evaluation.engine.tensor_parallel_size" in alone.why
    assert shared.seconds > 0


def test_a_rate_replaces_the_estimate_of_sampling_alone():
    judge = EngineWork("judging", "Qwen/Qwen2.5-7B-Instruct")
    sampling, judging = served({ENGINE: WORK, judge: WORK}, NODE, rate=500.0)
    assert sampling.seconds == 2e6 / 500 and sampling.rate == 500
    assert judging.seconds == gpu_seconds(SEVEN, judge, WORK, NODE)
