"""The losses that are measured are the same loss, and what is exact about them is checked."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import loss
from benchmarks.loss import CHUNKED, NAIVE, OURS, TRITON, Problem, Shape
from ema_scale.cli import app
from ema_scale.core.errors import UserError

SMALL = ["--tokens", "512", "--vocab", "32000", "--hidden", "16"]


@pytest.mark.parametrize("variant", [NAIVE, OURS, pytest.param(CHUNKED, marks=pytest.mark.liger)])
@pytest.mark.parametrize("direction", list(loss.BETA))
def test_all_variants_compute_the_same(direction, variant):
    problem = Problem.of(Shape(32, 500, 16, direction=direction))
    assert max(loss.errors(variant, problem)[:2]) < 1e-6
    for part in loss.PARTS:  # a strength or a direction that is ignored would be far off
        assert max(loss.errors(variant, problem.part(part))[:2]) < 1e-4


def test_triton_needs_a_gpu():
    assert "needs a GPU" in loss.missing(TRITON, Shape()) or "not installed" in loss.missing(TRITON, Shape())


@pytest.mark.slow
def test_the_command_measures_time_memory_and_error(tmp_path):
    out = tmp_path / "loss.json"
    done = CliRunner().invoke(app, ["bench", "loss", *SMALL, "--repeats", "2", "-o", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    variants = {variant["name"]: variant for variant in found["variants"]}
    assert list(variants) == [NAIVE, CHUNKED, TRITON, OURS]
    assert variants[TRITON]["median"] is None and variants[TRITON]["note"]
    assert len(variants[OURS]["seconds"]) == 2 and variants[OURS]["ratio"] == 1 and variants[OURS]["figures"]["cpu"] > 0
    assert 0 < variants[OURS]["figures"]["error"] < 1e-6
    assert 0 < variants[NAIVE]["figures"]["error"] < 1e-5  # torch's own: on some CPUs it is above 1e-6
    assert variants[OURS]["peak_bytes"] < 0.7 * variants[NAIVE]["peak_bytes"]  # a chunk is a quarter of the tokens
    targets = {target["name"]: target for target in found["targets"]}
    for name in ("error to float64", *loss.HELD, loss.OVER):
        assert targets[name]["met"] is True, targets[name]
    assert len(loss.HELD) == 5 and variants[OURS]["figures"]["value, policy_reference"] < 1e-6


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch):
    wrong = {"peak_bytes": 1, "seconds": 1.0, "cpu": 1.0, "error": 0.02, "parts": {}}
    monkeypatch.setattr(loss, "alone", lambda *_, **__: wrong)
    with pytest.raises(UserError, match="computes something else"):
        loss.bench_loss(Shape(8, 20, 4), repeats=1)


def test_what_does_not_fit_is_a_row(monkeypatch):
    monkeypatch.setattr(loss, "alone", lambda _, variant, **__: None if variant == NAIVE else {
        "peak_bytes": 3_000_000_000, "seconds": 2.0, "cpu": 2.0, "error": 1e-3, "parts": {}})  # fmt: skip
    measured, targets = loss.bench_loss(loss.FULL, repeats=1, each_alone=True)
    rows = {one.name: one for one in measured}
    assert rows[NAIVE].note == "out of memory" and rows[NAIVE].median is None and rows[OURS].median == 2.0
    assert [str(target) for target in targets][0] == "peak extra memory, GB: 3.00 (target: at most 2.00): MISSED"
