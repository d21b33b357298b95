"""Ways to train a step are measured side by side, and only if they train on the same loss."""

import json

import pytest
from typer.testing import CliRunner

from ema_scale.bench import step
from ema_scale.bench.plan import setup_of_task
from ema_scale.bench.reference import bench_reference
from ema_scale.bench.training_ways import CACHED, OFF, PLAIN, SECOND, TWO, WAYS, Task, Trained, chosen, train
from ema_scale.cli import app
from ema_scale.errors import UserError
from ema_scale.planning.traffic import a_micro_batch

TINY = Task(layers=2, rows=1, length=16, steps=2)


def test_all_ways_train_on_one_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path))
    losses = {way: train(way, TINY).losses for way in WAYS}
    step.check_losses(losses, "float32")
    defended, plain = losses[TWO], losses[PLAIN]
    assert len(plain) == 4 and all(a > b + 0.01 for a, b in zip(defended, plain, strict=True))


def test_losses_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(step, "train", lambda way, task: Trained([1.0], [1.0], [2.0 + (way == SECOND) * 0.001]))
    with pytest.raises(UserError, match="step 1: the loss of 'second model, full logits' is 2.001, and that of 'two"):
        step.bench_step(TINY, repeats=1, ways=(PLAIN, SECOND, TWO))


def test_the_command_measures_and_reads_the_bars(tmp_path):
    out = tmp_path / "step.json"
    options = "--layers 2 --rows 1 --length 16 --steps 2 --repeats 1 --way two_stream".split()
    done = CliRunner().invoke(app, ["bench", "step", *options, "-o", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    plain, two = found["ways"]
    assert (plain["name"], two["name"]) == (PLAIN, TWO) and len(two["seconds"]) == 2
    assert two["figures"]["cpu"] > 1 and 0 < two["figures"]["reference"] < 1
    assert two["figures"]["memory"] == two["peak_bytes"] / plain["peak_bytes"] < 1.3
    assert [bar["value"] for bar in found["bars"]] == [two["figures"]["cpu"], two["figures"]["memory"]]


def test_unknown_ways_and_shapes_are_named(tmp_path):
    assert chosen(["two", "cached"], WAYS) == (PLAIN, "two forwards, full logits", TWO, CACHED)
    with pytest.raises(UserError, match="--way: found 'three'"):
        chosen(["three"], WAYS)
    with pytest.raises(UserError, match="--model: found 'qwen9', expected one of small, qwen2.5-0.5b"):
        train(PLAIN, Task("qwen9"))


def test_the_floor_is_that_of_the_operations():
    # All layers and no head: 4 passes over 3. With the head's share of this model, above that.
    assert 1.33 < step.floor(Task(model="qwen2.5-7b", length=512)) < 1.38
    assert step.floor(Task()) < step.floor(Task(layers=1))


@pytest.mark.zero3
@pytest.mark.slow
def test_two_streams_and_a_cache_gather_what_plain_training_gathers():
    task = Task(layers=2, rows=1, length=16, steps=2, deepspeed="launch/deepspeed/zero3_cpu.json")
    measured, bars = bench_reference(task, processes=2, ways=(PLAIN, OFF, TWO, CACHED))
    for one in measured:  # what `ema plan` says of a micro-batch, to the byte
        setup = setup_of_task(one.name, task)
        assert a_micro_batch(setup) == (one.figures["gathered"], one.figures["calls"])
    traffic = {one.name: one.figures["traffic"] for one in measured}
    assert traffic[TWO] == traffic[CACHED] == 1
    assert traffic[OFF] > 1.3
    assert [bar.met for bar in bars if bar.name.startswith("bytes")] == [True, True]
