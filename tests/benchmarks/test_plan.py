"""`ema plan`'s memory is held against torch's allocator, case by case."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.allocated import held_bytes
from benchmarks.plan import bench_plan, cases
from benchmarks.training_variants import Task
from ema_scale.cli import app


@pytest.mark.slow
def test_plans_are_within_their_bar_of_what_is_measured(tmp_path):
    out = tmp_path / "plan.json"
    options = "--layers 2 --rows 2 --length 64 --only adapter_off".split()
    done = CliRunner().invoke(app, ["bench", "plan", *options, "-o", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    (case,), (target,) = found["variants"], found["targets"]
    assert case["name"] == target["name"] == "KL, adapter_off"
    # Weights alone are half of it, so a plan that forgot the step could not pass.
    weights = 4 * (2 * 8192 * 512 + 2 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 2048))
    assert weights < case["peak_bytes"] and target["met"] and target["value"] == abs(case["figures"]["off"])
    assert case["figures"]["planned"] / case["peak_bytes"] - 1 == case["figures"]["off"]


@pytest.mark.zero3
@pytest.mark.slow
def test_plans_of_sharded_weights_are_within_the_same_bar(tmp_path):
    task = Task("small", 2, 2, 64, steps=2)
    (case,), (target,) = bench_plan(task, str(tmp_path), only="ZeRO-3, KL, cached")
    # Half of the weights, and more than a head and a layer that are gathered: neither can be forgotten.
    half = 4 * (2 * 8192 * 512 + 2 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 2048)) / 2
    assert case.peak_bytes > half + 4 * 8192 * 512 and target.met


def test_every_case_changes_one_thing():
    assert len({(variant, task) for variant, task in cases(Task()).values()}) == len(cases(Task()))


def test_tensors_that_share_memory_count_once():
    before = held_bytes()
    whole = torch.zeros(1000)
    parts = whole.split(100)
    assert held_bytes() - before == 4000 and len(parts) == 10
