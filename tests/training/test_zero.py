"""Two processes: ZeRO-3, ZeRO-2 and DDP give the run that one process gives, and go on from its checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.together import together
from benchmarks.training_variants import Task
from benchmarks.training_variants import train as bench_train
from ema_scale.config.sections import SeparateReference
from ema_scale.core.checkpoints import list_checkpoints
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.defenses import (
    DFT,
    KL,
    LDIFS,
    Ablation,
    Antibody,
    Ceiling,
    EarlyStopping,
    GradientRouting,
    InoculationAdapter,
    StarDSS,
    Steering,
)
from ema_scale.models.directions import Directions
from ema_scale.training.distributed import _free_port
from ema_scale.training.run import train
from tests.tiny import save_tiny
from tests.training.helpers import tiny_peft
from tests.training.test_choices import SUITE, during
from tests.training.test_run import assert_same_weights, recipe_of, weights, world

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.zero3, pytest.mark.slow]
__all__ = ["world"]


def two_process_recipe(world, out, name, deepspeed=None, reference="auto", **training):
    path = None if deepspeed is None else str(ROOT / "launch" / "deepspeed" / deepspeed)
    recipe = recipe_of(
        world,
        out,
        name,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        deepspeed=path,
        **SHARED,
        **training,
    )
    return recipe.model_copy(update={"reference": reference})


# No dropout: its masks are drawn by each process.
SHARED = {"max_steps": 6, "save_steps": 3, "dropout": 0.0}
FOLDED = {"gradient_checkpointing": True, "activation_offload": True}


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
    """Of the reference: `auto` would take what another test of the same model left in the shared one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory):
    recipe = recipe_of(
        world, tmp_path_factory.mktemp("one"), per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED
    )
    return train(recipe, RunDir(recipe.run_path))


def with_vector(recipe, world):
    """The recipe with its KL, steered after the first layer and ablated after the second, with weights of rows and
    tokens, and with two adapters beside the policy's, of which one learns rows of its own."""
    path = world / "vector.safetensors"
    if not path.exists():
        Directions(torch.randn(3, 64, generator=torch.Generator().manual_seed(0))).save(path)
        tiny_peft(spread=0.1).save_pretrained(world / "beside")
    others = [
        Steering(str(path), 0.5, [1], "unit"), Ablation(str(path), [2]),
        DFT(0.3), Antibody(-5.0, 1.0, "reference"), StarDSS(str(path), 0.0, 0.3, 0.1),
        GradientRouting(str(world / "safe.jsonl"), 0.5), InoculationAdapter(str(world / "beside"), 0.5),
    ]  # fmt: skip
    return recipe.model_copy(update={"defenses": [*recipe.defenses, *others]})


def with_parts(recipe, world, limit):
    """Two defenses with rows of their own, one on hidden states, and one that ends the run and goes back; and a choice
    suite of three questions, which two processes do not share evenly."""
    safe = str(world / "safe.jsonl")
    stop = EarlyStopping("kl", limit, window=1, keep="last_below")
    defenses = [LDIFS(0.5), Ceiling(1.0, safe, 0.25), KL(0.3, prompts=safe, fraction=0.25), stop]
    return during(recipe.model_copy(update={"defenses": defenses}), world, every=2)


def stopped_alone(world, out):
    """The run of `with_parts` on one process, which stops after its fifth step, and its limit."""
    limit = 99.0
    for name in ("unstopped", "stopped"):
        recipe = with_parts(
            recipe_of(world, out, name, per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED),
            world,
            limit,
        )
        run = train(recipe, RunDir(recipe.run_path))
        read = [row["early_stopping_kl"] for row in read_jsonl(run.metrics_path) if "early_stopping_kl" in row]
        limit = (read[3] + read[4]) / 2 if len(read) == 6 else limit
    assert max(read[:4]) < limit < read[4]
    assert run.status().stopped_early.endswith("the adapter is that of step 4")
    return run, limit


def assert_stopped_alike(one, other):
    assert_same_run(one, other)
    ours, theirs = ([row for row in read_jsonl(run.metrics_path) if SUITE in row] for run in (one, other))
    assert [row["step"] for row in ours] == [0, 2, 4] and ours[0][SUITE] != ours[2][SUITE]
    for our_row, their_row in zip(ours, theirs, strict=True):
        for name in (name for name in our_row if name.startswith("choices/")):
            assert their_row[name] == pytest.approx(our_row[name], abs=2e-4), name
    assert [run.status().step for run in (one, other)] == [5, 5]
    assert other.status().stopped_early.endswith("the adapter is that of step 4")


def tied(recipe, world, packing):
    """The recipe with a tied head, KL and LDIFS, and two steps: in the second the adapter has moved."""
    path = world / "tied"
    if not path.exists():
        save_tiny(path, tie_word_embeddings=True)
    steps = {"max_steps": 2, "save_steps": 2, "warmup_steps": 0, "packing": packing, "gradient_checkpointing": True}
    changed = {"defenses": [KL(0.5), LDIFS(0.5, count=2)], "training": recipe.training.model_copy(update=steps)}
    return recipe.model_copy(update={**changed, "model": recipe.model.model_copy(update={"path": str(path)})})


def assert_same_gradients(one, other):
    """Adam's first moments are 0.09 of the first step's gradients and 0.1 of the second's, unrounded by what Adam makes
    of them."""
    ours, theirs = (load_file(list_checkpoints(run.checkpoints)[-1] / "state.safetensors") for run in (one, other))
    names = [name for name in ours if name.endswith("|exp_avg")]
    assert len(names) == 2 * 2 * 7 and ours.keys() == theirs.keys()
    for name in names:
        assert (theirs[name] - ours[name]).norm() < 1e-4 * ours[name].norm(), name
    for ours_row, theirs_row in zip(read_jsonl(one.metrics_path), read_jsonl(other.metrics_path), strict=True):
        for name in ("loss", "ce", "kl", "ldifs", "grad_norm"):
            assert theirs_row[name] == pytest.approx(ours_row[name], rel=2e-4, abs=1e-6), name
    assert ours_row["kl"] > 1e-4 and ours_row["ldifs"] > 1e-4


def run_command(command, cwd=ROOT, **environment):
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def run_workers(recipes, folder, **environment):
    """Train them one after another on two processes."""
    for recipe in recipes:
        (folder / f"{recipe.name}.yaml").write_text(recipe.to_yaml())
    paths = [str(folder / f"{recipe.name}.yaml") for recipe in recipes]
    together("tests.training.zero_worker:train_all", 2, *paths, **environment)


def assert_same_run(one, other, tolerance=2e-5):
    for ours, theirs in zip(read_jsonl(one.metrics_path), read_jsonl(other.metrics_path), strict=True):
        assert ours["step"] == theirs["step"]
        for name in {
            "loss",
            "ce",
            "kl",
            "ldifs",
            "ceiling",
            "early_stopping_kl",
            "grad_norm",
            "accuracy",
        } & ours.keys():
            assert theirs[name] == pytest.approx(ours[name], rel=2e-4, abs=1e-6), (ours["step"], name)
    assert_same_weights(weights(one), weights(other), tolerance)


def continued(one, recipe):
    """A run folder of `recipe` that holds the first checkpoint and the rows of another run."""
    run = RunDir(recipe.run_path).create()
    shutil.copytree(list_checkpoints(one.checkpoints)[0], run.checkpoints / "checkpoint-3")
    shutil.copy(one.metrics_path, run.metrics_path)
    return run


def test_zero3_on_two_processes_equals_one_process(world, one_process, tmp_path):
    """Through `accelerate launch` and the command line, in a folder that is no checkout; then one process goes on from
    its checkpoint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = two_process_recipe(world, tmp_path, "zero3")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    output = run_command(
        [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ROOT / "launch" / "accelerate" / "zero3_cpu.yaml"),
            "--num_processes", "2", "--main_process_port", str(_free_port()),
            "-m", "ema_scale", "train", str(tmp_path / "recipe.yaml"),
        ],
        tmp_path,
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    run = RunDir(recipe.run_path)
    assert run.status().state == "finished" and run.status().processes == 2
    assert "using adapter_off" not in output  # ZeRO-3 chooses two_stream, and it fits
    chosen = json.loads(run.provenance_path.read_text())["reference"]
    assert chosen["way"] == "two_stream" and "each layer is gathered once" in chosen["why"]
    assert "reference: the base model, by two_stream" in output
    assert_same_run(one_process, run)
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    loaded = PeftModel.from_pretrained(base, run.adapter)
    mine = {n.replace(".default", ""): p.detach() for n, p in loaded.named_parameters() if "lora_" in n}
    assert_same_weights(weights(one_process), mine, 2e-5)
    state = load_file(list_checkpoints(run.checkpoints)[0] / "state.safetensors")
    for name, tensor in load_file(list_checkpoints(one_process.checkpoints)[0] / "state.safetensors").items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-5)

    alone = recipe_of(world, tmp_path, "alone", per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED)
    assert_same_run(one_process, train(alone, continued(run, alone)))


AHEAD = """
import json, sys
from benchmarks.random_model import random_base
from benchmarks.training_variants import PLAIN, TWO, Task, train
from ema_scale.training.distributed import prepare_environment

config, model, out = sys.argv[1:]
task = Task(layers=2, rows=1, length=16, steps=2, saved=model, deepspeed=config)
random_base(task.fields, task.dtype, "cpu").save_pretrained(model)
prepare_environment(config)
json.dump({way: train(way, task).losses for way in (PLAIN, TWO)}, open(out, "w"))
"""


def test_zero3_that_fetches_ahead_trains_on_the_same_losses(tmp_path):
    """With the config for GPUs, which one CPU process can run, too: in the second step ZeRO-3 fetches ahead what the
    first step's checks have run, and so the head, just before the loss gathers it."""
    paths = [str(tmp_path / name) for name in ("model", "losses.json")]
    run_command([sys.executable, "-c", AHEAD, str(ROOT / "launch/deepspeed/zero3.json"), *paths])
    found = json.loads(Path(paths[1]).read_text())
    for way, losses in found.items():
        alone = bench_train(way, Task(layers=2, rows=1, length=16, steps=2, saved=paths[0])).losses
        assert losses == pytest.approx(alone, rel=1e-5), way


def test_under_zero3_a_model_that_was_loaded_is_nowhere_whole(world, tmp_path):
    recipe = two_process_recipe(world, tmp_path, "loaded", "zero3_cpu.json")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    found, _ = together("tests.training.zero_worker:held", 2, str(tmp_path / "recipe.yaml"))
    assert len(found) == 2
    size = sum(t.numel() for t in load_file(world / "model" / "model.safetensors").values())
    for whole, held, all_of_it in found:
        assert (whole, all_of_it) == (0, size) and size / 2 <= held < size / 2 + 100  # parts are padded


def test_ddp_zero2_and_zero3_go_on_from_a_checkpoint_of_one_process(world, one_process, tmp_path):
    recipes = [
        two_process_recipe(world, tmp_path, "ddp"),
        two_process_recipe(world, tmp_path, "zero2", "zero2_cpu.json"),
        two_process_recipe(world, tmp_path, "zero3", "zero3_cpu.json", "adapter_off", gradient_checkpointing=True),
        two_process_recipe(world, tmp_path, "zero3-two", "zero3_cpu.json", "two_stream", **FOLDED),
        two_process_recipe(world, tmp_path, "ddp-fresh", None, "two_stream", **FOLDED),
        two_process_recipe(world, tmp_path, "zero2-fresh", "zero2_cpu.json", "two_stream", **FOLDED),
    ]
    # Without any reference pass ZeRO-3 takes other paths through the model.
    plain = recipe_of(
        world,
        tmp_path,
        "fresh-plain",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        drift_every=0,
        **SHARED,
    )
    plain = plain.model_copy(update={"defenses": []})
    for way in ("adapter_off", "two_stream"):
        recipe = two_process_recipe(world, tmp_path, f"fresh-{way}", "zero3_cpu.json", way, drift_every=0)
        recipes.append(recipe.model_copy(update={"defenses": []}))
    # Hooks on the decoder layers, which recomputation and ZeRO-3's own hooks must see alike.
    alone = with_vector(
        recipe_of(
            world, tmp_path, "fresh-vector", per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED
        ),
        world,
    )
    for name, deepspeed, way in (("ddp", None, "auto"), ("zero3", "zero3_cpu.json", "two_stream")):
        recipe = two_process_recipe(
            world, tmp_path, f"fresh-{name}-vector", deepspeed, way, gradient_checkpointing=deepspeed is not None
        )
        recipes.append(with_vector(recipe, world))
    stopped, limit = stopped_alone(world, tmp_path)
    for name, deepspeed in (("ddp", None), ("zero2", "zero2_cpu.json"), ("zero3", "zero3_cpu.json")):
        recipes.append(with_parts(two_process_recipe(world, tmp_path, f"fresh-{name}-parts", deepspeed), world, limit))
    for recipe in recipes:
        if "fresh" not in recipe.name:
            continued(one_process, recipe)
    heads = [
        tied(two_process_recipe(world, tmp_path, f"tied-{way}-{packing}", "zero3_cpu.json", way), world, packing)
        for packing in (False, True)
        for way in ("two_stream", "adapter_off")
    ]
    run_workers([*recipes, *heads], tmp_path)
    for recipe in recipes[:6]:
        assert_same_run(one_process, RunDir(recipe.run_path))
    expected = train(plain, RunDir(plain.run_path))
    for recipe in recipes[6:8]:
        assert_same_run(expected, RunDir(recipe.run_path))
    expected = train(alone, RunDir(alone.run_path))
    assert read_jsonl(expected.metrics_path)[0]["kl"] > 1e-4  # of the steered policy
    for recipe in recipes[8:10]:
        assert_same_run(expected, RunDir(recipe.run_path))
    for recipe in recipes[10:]:
        assert_stopped_alike(stopped, RunDir(recipe.run_path))
    assert_tied_equal_one_process(world, tmp_path, heads)


def assert_tied_equal_one_process(world, out, heads):
    for packing in (False, True):
        alone = recipe_of(
            world, out, f"tied-alone-{packing}", per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED
        )
        expected = train(tied(alone, world, packing), RunDir(alone.run_path))
        for recipe in (recipe for recipe in heads if recipe.training.packing == packing):
            assert_same_gradients(expected, RunDir(recipe.run_path))


def test_cached_separate_and_continued_references_on_two_processes(world, one_process, tmp_path):
    """ZeRO-3 fills the cache and DDP reads the same one; another model is sharded in an engine of its own."""
    another = {"kind": "separate", "model": str(world / "model")}
    start = recipe_of(world, tmp_path, "start", per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED)
    going_on = start.model_copy(
        update={"adapter": start.adapter.model_copy(update={"start": str(one_process.adapter)})}
    )
    expected = train(going_on, RunDir(going_on.run_path))
    recipes = [
        two_process_recipe(world, tmp_path, "cached", "zero3_cpu.json", "cached"),
        two_process_recipe(
            world, tmp_path, "cached-recomputing", "zero3_cpu.json", "cached", gradient_checkpointing=True
        ),
        two_process_recipe(world, tmp_path, "cached-ddp", None, "cached"),
        two_process_recipe(world, tmp_path, "separate", "zero3_cpu.json", SeparateReference.of(another)),
        two_process_recipe(world, tmp_path, "separate-ddp", None, SeparateReference.of(another)),
    ]
    for way in ("adapter_off", "two_stream", "cached"):
        recipe = two_process_recipe(world, tmp_path, f"start-{way}", "zero3_cpu.json", way)
        recipes.append(recipe.model_copy(update={"adapter": going_on.adapter}))
    run_workers(recipes, tmp_path, EMA_CACHE=str(tmp_path / "cache"))
    for recipe in recipes[:5]:
        assert_same_run(one_process, RunDir(recipe.run_path))
    for recipe in recipes[5:]:
        assert_same_run(expected, RunDir(recipe.run_path))
    folders = [p for p in (tmp_path / "cache" / "reference").iterdir() if p.is_dir()]
    assert len(folders) == 2  # of the base, however it is sharded, and of the adapter
    assert all(len(list(folder.glob("last/*.json"))) == 2 for folder in folders)  # each process wrote its part
