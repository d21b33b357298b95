"""Two processes under FSDP2 give the run that one process gives, by every way to run the reference, and hand
checkpoints to each other."""

import json
import sys

import pytest
from typer.testing import CliRunner

from benchmarks.plan import setup_of_task
from benchmarks.training_variants import Task
from ema_scale.cli import app
from ema_scale.config.sections import SeparateReference
from ema_scale.core.checkpoints import list_checkpoints
from ema_scale.core.run_dir import RunDir
from ema_scale.planning.speed import a_micro_batch
from ema_scale.training.distributed import _free_port
from ema_scale.training.run import train
from tests.training.test_run import recipe_of, world
from tests.training.test_zero import (
    FOLDED,
    SHARED,
    assert_same_run,
    assert_stopped_alike,
    assert_tied_equal_one_process,
    continued,
    empty_cache,
    one_process,
    run_command,
    run_workers,
    stopped_alone,
    tied,
    two_process_recipe,
    with_parts,
    with_vector,
)

pytestmark = [pytest.mark.zero3, pytest.mark.slow]
__all__ = ["empty_cache", "one_process", "world"]


def fsdp_recipe(world, out, name, reference="auto", **training):
    return two_process_recipe(world, out, name, None, reference, fsdp=True, **training)


def test_fsdp_on_two_processes_equals_one_process(world, one_process, tmp_path):
    another = SeparateReference.of({"kind": "separate", "model": str(world / "model")})
    recipes = [
        fsdp_recipe(world, tmp_path, "two", "two_stream"),
        fsdp_recipe(world, tmp_path, "two-folded", "two_stream", **FOLDED),
        fsdp_recipe(world, tmp_path, "off", "adapter_off", gradient_checkpointing=True),
        fsdp_recipe(world, tmp_path, "cached", "cached"),
        fsdp_recipe(world, tmp_path, "separate", another),
        fsdp_recipe(world, tmp_path, "goes-on", "two_stream"),
    ]
    continued(one_process, recipes[-1])
    plain = recipe_of(
        world,
        tmp_path,
        "plain-alone",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        drift_every=0,
        **SHARED,
    )
    plain = plain.model_copy(update={"defenses": []})
    vector = with_vector(
        recipe_of(
            world, tmp_path, "vector-alone", per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED
        ),
        world,
    )
    others = [
        fsdp_recipe(world, tmp_path, "plain", drift_every=0).model_copy(update={"defenses": []}),
        with_vector(fsdp_recipe(world, tmp_path, "vector", "two_stream", gradient_checkpointing=True), world),
    ]
    stopped, limit = stopped_alone(world, tmp_path)
    parts = with_parts(fsdp_recipe(world, tmp_path, "parts", "two_stream"), world, limit)
    heads = [
        tied(fsdp_recipe(world, tmp_path, f"tied-{packing}", "two_stream"), world, packing) for packing in (False, True)
    ]
    run_workers([*recipes, *others, parts, *heads], tmp_path, EMA_CACHE=str(tmp_path / "cache"))
    assert_stopped_alike(stopped, RunDir(parts.run_path))
    for recipe in recipes:
        assert_same_run(one_process, RunDir(recipe.run_path))
    for alone, recipe in zip((plain, vector), others, strict=True):
        assert_same_run(train(alone, RunDir(alone.run_path)), RunDir(recipe.run_path))
    assert_tied_equal_one_process(world, tmp_path, heads)
    (cache,) = [p for p in (tmp_path / "cache" / "reference").iterdir() if p.is_dir()]
    assert len(list(cache.glob("last/*.json"))) == 2  # each process wrote its part

    alone = recipe_of(world, tmp_path, "alone", per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED)
    run = RunDir(recipes[0].run_path)
    assert len(list_checkpoints(run.checkpoints)) == 2
    assert_same_run(one_process, train(alone, continued(run, alone)))


def test_fsdp_by_accelerate_launch_chooses_two_stream(world, one_process, tmp_path):
    recipe = two_process_recipe(world, tmp_path, "launched")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    output = run_command(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/fsdp2_cpu.yaml",
            "--num_processes", "2", "--main_process_port", str(_free_port()),
            "-m", "ema_scale", "train", str(tmp_path / "recipe.yaml"),
        ]
    )  # fmt: skip
    run = RunDir(recipe.run_path)
    chosen = json.loads(run.provenance_path.read_text())["reference"]
    assert chosen["way"] == "two_stream" and "each layer is gathered once" in chosen["why"]
    assert "using adapter_off" not in output
    assert_same_run(one_process, run)


def test_fsdp_gathers_no_more_with_a_reference_than_without(tmp_path):
    """And a second forward does: so the count counts."""
    options = "--fsdp --layers 2 --length 16 --steps 1 --variant two_stream --variant adapter_off".split()
    done = CliRunner().invoke(app, ["bench", "reference", *options, "--out", str(tmp_path / "bench.json")])
    assert done.exit_code == 0, done.output
    found = {row["name"]: row for row in json.loads((tmp_path / "bench.json").read_text())["variants"]}
    task = Task(layers=2, length=16, fsdp=True)
    for name, row in found.items():  # as `ema plan` counts them
        counted = row["figures"]["gathered"], row["figures"]["calls"]
        assert a_micro_batch(setup_of_task(name, task)) == counted
    assert found["two_stream"]["figures"]["traffic"] == 1
    assert found["adapter_off: two forwards, fused"]["figures"]["traffic"] > 1.2
