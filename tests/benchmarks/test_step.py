"""Variants to train a step are measured side by side, and only if they train on the same loss."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from benchmarks import step
from benchmarks.cli_training import _config
from benchmarks.phases import PHASES
from benchmarks.plan import setup_of_task
from benchmarks.training_variants import (
    CACHED,
    DRIFT,
    OFF,
    PLAIN,
    SECOND,
    TWO,
    VARIANTS,
    WITH,
    Task,
    Trained,
    chosen,
    train,
)
from ema_scale.cli import app
from ema_scale.core.errors import UserError
from ema_scale.planning.speed import a_micro_batch

TINY = Task(layers=2, rows=1, length=16, steps=2)


def test_all_ways_train_on_one_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path))
    losses = {variant: train(variant, TINY).losses for variant in VARIANTS}
    step.check_losses(losses, "float32")
    defended, plain = losses[TWO], losses[PLAIN]
    assert len(plain) == 4 and all(a > b + 0.01 for a, b in zip(defended, plain, strict=True))


def test_each_defense_is_priced_on_rows_of_its_own(tmp_path):
    task = Task(layers=2, rows=4, length=16, steps=1, checkpointing=False)
    plain = train(PLAIN, task).losses
    star, routed = "{kind: star_dss, limit: 0}", "gradient_routing"
    for spec in ("dft", "{kind: kl, strength: 0.5}", "safegrad", star, routed, "inoculation_adapter"):
        losses = train(WITH + spec, task).losses
        assert len(losses) == 3
        assert (losses[0] != pytest.approx(plain[0], rel=1e-4)) is (spec != "inoculation_adapter"), "its B is 0"
        step.check_losses({WITH + spec: losses, PLAIN: plain}, "float32")
    with pytest.raises(UserError, match="--defense safelora: needs unaligned base model"):
        train(WITH + "safelora", task)


def test_losses_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(step, "train", lambda variant, task: Trained([1.0], [1.0], [2.0 + (variant == SECOND) * 0.001]))
    with pytest.raises(UserError, match="step 1: the loss of 'second model, full logits' is 2.001, and that of 'two"):
        step.bench_step(TINY, repeats=1, variants=(PLAIN, SECOND, TWO))


@pytest.mark.slow
def test_the_command_measures_and_reads_the_bars(tmp_path):
    out = tmp_path / "step.json"
    options = "--layers 2 --rows 1 --length 16 --steps 2 --repeats 1 --variant two_stream".split()
    done = CliRunner().invoke(app, ["bench", "step", *options, "-o", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    plain, two = found["variants"]
    assert (plain["name"], two["name"]) == (PLAIN, TWO) and len(two["seconds"]) == 2
    assert two["figures"]["cpu"] > 1 and 0 < two["figures"]["reference"] < 1
    assert two["figures"]["memory"] == two["peak_bytes"] / plain["peak_bytes"] < 1.3
    assert {*PHASES} <= set(two["figures"]) and "reference's" not in plain["figures"]
    # Disjoint, and inside the step.
    assert all(two["figures"][name] > 0 for name in PHASES)
    assert [target["value"] for target in found["targets"]] == [two["figures"]["cpu"], two["figures"]["memory"]]


def test_unknown_ways_and_shapes_are_named(tmp_path):
    assert chosen(["two", "cached"], VARIANTS) == (PLAIN, "two forwards, full logits", TWO, CACHED)
    with pytest.raises(UserError, match="--variant: found 'three'"):
        chosen(["three"], VARIANTS)
    with pytest.raises(UserError, match="--model: found 'qwen9', expected one of small, qwen2.5-0.5b"):
        train(PLAIN, Task("qwen9"))


def test_the_floor_is_that_of_the_operations():
    # All layers and no head: 4 passes over 3. With the head's share of this model, above that.
    large = Task(model="qwen2.5-7b", length=512)
    assert 1.33 < step.floor(OFF, large) < 1.38
    assert step.floor(OFF, Task()) < step.floor(OFF, Task(layers=1))
    assert step.floor(PLAIN, large) == 1 < step.floor(CACHED, large) < 1.1
    # A reading forms no gradient; without a divergence no head is needed beyond plain fine-tuning's.
    assert step.floor(DRIFT, large) < step.floor(TWO, large) == step.floor(SECOND, large)
    assert step.floor(CACHED, replace(large, kl=0.0)) == 1


def test_a_config_is_found_beside_the_package_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _config("launch/deepspeed/zero3_cpu.json").is_file()
    done = CliRunner().invoke(app, ["bench", "reference", "--deepspeed", "zero9.json"])
    assert isinstance(done.exception, UserError) and f"no file zero9.json in {tmp_path} or beside" in str(
        done.exception
    )


@pytest.mark.zero3
@pytest.mark.slow
def test_two_streams_and_a_cache_gather_what_plain_training_gathers(tmp_path):
    out = tmp_path / "reference.json"
    options = "--layers 2 --length 16 --steps 2 --variant adapter_off --variant two_stream --variant cached".split()
    done = CliRunner().invoke(app, ["bench", "reference", *options, "-o", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    figures = {variant["name"]: variant["figures"] for variant in found["variants"]}
    assert list(figures) == [PLAIN, OFF, TWO, CACHED]
    assert figures[TWO]["traffic"] == figures[CACHED]["traffic"] == 1
    assert figures[OFF]["traffic"] > 1.3
    # No variant trains more parameters than another.
    assert {variant["reduction"] for variant in figures.values()} == {1.0}
    targets = {target["name"]: target["met"] for target in found["targets"] if target["name"].startswith("bytes")}
    assert len(targets) == 4 and all(targets.values())
    task = Task(layers=2, rows=1, length=16, steps=2, deepspeed=str(_config("launch/deepspeed/zero3_cpu.json")))
    for name, variant in figures.items():  # what `ema plan` says of a micro-batch, to the byte
        assert a_micro_batch(setup_of_task(name, task)) == (variant["gathered"], variant["calls"])


@pytest.mark.zero3
@pytest.mark.slow
def test_ddp_gathers_nothing_and_reduces_the_adapters_gradient(tmp_path):
    out = tmp_path / "ddp.json"
    options = "--deepspeed none --layers 1 --length 16 --steps 1 --variant plain".split()
    done = CliRunner().invoke(app, ["bench", "reference", *options, "-o", str(out)])
    assert done.exit_code == 0, done.output
    layer = 32 * (2 * (512 + 512) + 2 * (512 + 128) + 3 * (512 + 2048))  # LoRA of q and o, k and v, the MLP
    for variant in json.loads(out.read_text())["variants"]:
        assert variant["figures"]["gathered"] == variant["figures"]["calls"] == 0
        assert variant["figures"]["reduced"] == 4 * layer
