"""A CPU's cores and bfloat16, and which sampler a job takes."""

import json
import logging
import sys
from pathlib import Path

import psutil
import pytest
import torch

from ema_scale.config.sections import EvaluationRecipe, ModelRecipe
from ema_scale.core import devices
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.records import MANIFEST_FILE, Manifest
from ema_scale.evaluation.remaining import sampler_used
from ema_scale.inference import cpu, make
from ema_scale.inference.base import SamplerOptions
from ema_scale.inference.chat_prompts import load_config
from ema_scale.models.load import pick_dtype


@pytest.mark.parametrize(
    ("quota", "busy", "free", "idle"),
    [(None, 0.2, 8, 8), ("max 100000", 12.9, 8, 3), ("250000 100000", 3.0, 3, 3), ("50000 100000", 16.0, 1, 1)],
)
def test_cores_within_the_quota_that_other_work_leaves_idle(tmp_path, monkeypatch, quota, busy, free, idle):
    """Of a machine of 16 cores, 8 of which are allowed. What this process did before does not count as other work."""
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(devices, "CGROUP_QUOTAS", ((tmp_path / "cpu.max",),))
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(devices.os, "getloadavg", lambda: (16.0, 16.0, 16.0))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100 * busy / 16)
    assert (devices.free_cores(), devices.idle_cores()) == (free, idle)


def test_threads_are_the_users_or_one_for_a_small_model_or_the_idle_cores(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cpu, "idle_cores", lambda: 5)
    monkeypatch.setattr(cpu, "free_cores", lambda: 8)
    monkeypatch.setattr(cpu, "SMALL_WEIGHTS", 10)
    model, weights = ModelRecipe(path=str(tmp_path)), tmp_path / "model.safetensors"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu.cpu_threads(model) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    for size, threads in ((9, 1), (10, 5)):
        weights.write_bytes(b"0" * size)
        assert cpu.cpu_threads(model) == threads
    assert cpu.cpu_threads(ModelRecipe(path="org/model")) == 5
    assert "sampling on 1 of 8 cores: the model is small" in caplog.text
    assert "sampling on 5 of 8 cores: those that other work leaves idle" in caplog.text


@pytest.mark.parametrize(
    ("flags", "own", "expected"),
    [
        ("fpu avx512_bf16", "bfloat16", "bfloat16"),
        ("amx_bf16", "float16", "bfloat16"),
        ("fpu avx512f", "bfloat16", "float32"),
        ("avx512_bf16", "float32", "float32"),
        ("avx512_bf16", None, "float32"),
    ],
)
def test_bfloat16_where_the_cpu_and_the_checkpoint_have_it(tmp_path, monkeypatch, flags, own, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(devices, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | ({"dtype": own} if own else {})))
    config = load_config(ModelRecipe(path=str(tmp_path)))
    assert devices.cpu_dtype(config) == expected
    assert pick_dtype("auto", config) == getattr(torch, expected), "training as sampling"


def test_an_emulated_dtype_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(devices, "CPU_INFO", tmp_path / "cpuinfo")
    for flags, warned in (("fpu amx_bf16", False), ("fpu avx512f", True)):
        devices.warn_if_emulated.cache_clear()
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        assert pick_dtype("bfloat16") == torch.bfloat16
        assert ("this CPU emulates bfloat16" in caplog.text) == warned


def test_auto_takes_transformers_for_a_small_job_on_a_cpu(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(make, "is_cpu_build", lambda: True)
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(make, "choose_reason_against_vllm", lambda options: None)
    options = SamplerOptions(ModelRecipe(path="m"))
    assert make.sampler_name("auto", options, 256) == "transformers"
    assert "256 answers take less time than vLLM's start on a CPU" in caplog.text
    assert make.sampler_name("auto", options, 257) == make.sampler_name("auto", options) == "vllm"
    assert make.sampler_name("vllm", options, 1) == "vllm"
    (tmp_path / "model.safetensors").write_bytes(b"1")  # a small model answers more in that time
    small = SamplerOptions(ModelRecipe(path=str(tmp_path)))
    assert [make.sampler_name("auto", small, n) for n in (10_000, 10_001)] == ["transformers", "vllm"]
    # Its arguments are asked for.
    assert make.sampler_name("auto", SamplerOptions(ModelRecipe(path="m"), extra={"max_num_seqs": 4}), 1) == "vllm"
    monkeypatch.setattr(make, "is_cpu_build", lambda: False)
    assert make.sampler_name("auto", options, 1) == "vllm"


def test_a_small_job_never_imports_vllm(monkeypatch):
    monkeypatch.setattr(make, "is_cpu_build", lambda: True)
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert make.sampler_name("auto", SamplerOptions(ModelRecipe(path="m")), 9) == "transformers"


def test_a_killed_evaluation_goes_on_with_its_sampler(tmp_path):
    manifest = Manifest(target="a", model="m", adapter=None, settings=EvaluationRecipe(), suites=())
    manifest.model_copy(update={"sampler": {"name": "vllm"}}).write(tmp_path / MANIFEST_FILE)
    settings = EvaluationRecipe(sampler="auto")
    assert sampler_used([EvalTarget("a", None, Path(tmp_path))], settings) == "vllm"
    assert sampler_used([EvalTarget("a", None, tmp_path / "new")], settings) is None
