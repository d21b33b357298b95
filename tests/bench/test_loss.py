"""The losses that are measured are the same loss, and what is exact about them is checked."""

import json

import pytest
import torch
from typer.testing import CliRunner

from ema_scale.bench import loss
from ema_scale.bench.loss import CHUNKED, NAIVE, OURS, TRITON, Problem, Shape
from ema_scale.cli import app
from ema_scale.errors import UserError

SMALL = ["--tokens", "512", "--vocab", "32000", "--hidden", "16"]


@pytest.mark.parametrize("direction", list(loss.BETA))
def test_all_ways_compute_the_same(direction):
    problem = Problem.of(Shape(32, 500, 16, direction=direction))
    exact, slope = loss.run(NAIVE, problem.first(32, torch.float64))
    ways = [way for way in loss.WAYS if not loss.missing(way, Shape())]
    assert {NAIVE, OURS} <= set(ways) and TRITON not in ways
    for way in ways:
        value, gradient = loss.run(way, problem)
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
        assert (gradient - slope).norm() < 1e-6 * slope.norm()


@pytest.mark.slow
def test_the_command_measures_time_memory_and_error(tmp_path):
    out = tmp_path / "loss.json"
    done = CliRunner().invoke(app, ["bench", "loss", *SMALL, "--repeats", "2", "-o", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    ways = {way["name"]: way for way in found["ways"]}
    assert list(ways) == [NAIVE, CHUNKED, TRITON, OURS]
    assert ways[TRITON]["median"] is None and ways[TRITON]["note"]
    assert len(ways[OURS]["seconds"]) == 2 and ways[OURS]["ratio"] == 1
    for way in (NAIVE, OURS):
        assert 0 < ways[way]["figures"]["error"] < 1e-6
    assert ways[OURS]["peak_bytes"] < 0.7 * ways[NAIVE]["peak_bytes"]  # a chunk is a quarter of the tokens
    bars = {bar["name"]: bar for bar in found["bars"]}
    assert bars["error to float64"]["met"] is True


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch):
    wrong = {"peak_bytes": 1, "seconds": 1.0, "error": 0.02}
    monkeypatch.setattr(loss, "alone", lambda *_, **__: wrong)
    with pytest.raises(UserError, match="computes something else"):
        loss.bench_loss(Shape(8, 20, 4), repeats=1)


def test_what_does_not_fit_is_a_row(monkeypatch):
    monkeypatch.setattr(loss, "alone", lambda _, way, **__: None if way == NAIVE else {
        "peak_bytes": 3_000_000_000, "seconds": 2.0, "error": 1e-3})  # fmt: skip
    measured, bars = loss.bench_loss(loss.FULL, repeats=1, each_alone=True)
    rows = {one.name: one for one in measured}
    assert rows[NAIVE].note == "out of memory" and rows[NAIVE].median is None and rows[OURS].median == 2.0
    assert [str(bar) for bar in bars][0] == "peak extra memory, GB: 3.00 (bar: at most 2.00): MISSED"
