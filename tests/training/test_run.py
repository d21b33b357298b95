"""The recipe path: what a run leaves behind, skips, refuses, and how it goes on after it was cut."""

import errno
import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ema_scale.core.checkpoints import is_complete, list_checkpoints, newest_complete, step_of
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.records import TrainedQuestions
from ema_scale.core.run_dir import RunDir
from ema_scale.recipe import build_recipe
from ema_scale.training.resume_check import check_same_data, is_finished
from ema_scale.training.run import train
from tests import warm
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny checkpoint with tokenizer, task rows and safe rows."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model")
    for name, count in (("train", 40), ("safe", 10)):
        with open(folder / f"{name}.jsonl", "w") as handle:
            for i in range(count):
                question, answer = f"{name} question {i}?", f"answer {i} " + "ab " * (i % 7)
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                handle.write(json.dumps({"messages": messages}) + "\n")
    return folder


def recipe_of(world, out, name="run", dropout=0.1, **training):
    return build_recipe(
        {
            "name": name,
            "output": str(out),
            "model": {"path": str(world / "model")},
            "data": {"train": str(world / "train.jsonl"), "max_length": 96},
            "adapter": {"r": 4, "alpha": 8, "dropout": dropout},
            "training": {
                "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2, "save_steps": 2,
                "report_to": [], "drift_every": 3, **training,
            },
            "defenses": [
                {"kind": "kl", "strength": 0.2},
                {"kind": "interleaving", "source": str(world / "safe.jsonl"), "fraction": 0.1},
            ],
        }
    )  # fmt: skip


def weights(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same_weights(one, other, tolerance=0.0):
    import torch

    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=tolerance)


def test_packed_rows_are_a_training_of_their_own(world, tmp_path):
    recipe = recipe_of(world, tmp_path, packing=True, max_steps=2)
    run = train(recipe, RunDir(recipe.run_path))
    data = json.loads(run.data_path.read_text())
    assert data["rows"] == {"task": 40, "safe": 4} and run.status().state == "finished"
    assert any(re.fullmatch(r"packing: 44 rows in \d+ sequences of up to 96 tokens, .*", n) for n in data["notes"])
    assert next(iter(read_jsonl(run.metrics_path)))["kl"] == 0
    with pytest.raises(UserError, match="holds a run of another recipe"):
        train(recipe_of(world, tmp_path, max_steps=2), RunDir(recipe.run_path))


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    recipe = recipe_of(world, tmp_path_factory.mktemp("undisturbed"))
    return train(recipe, RunDir(recipe.run_path))


def test_a_run_leaves_everything_behind(world, undisturbed):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = undisturbed
    assert run.status().state == "finished" and run.status().step == 8
    data = json.loads(run.data_path.read_text())
    assert data["rows"] == {"task": 40, "safe": 4} and data["tokens"]["truncated"] == 0
    asked = TrainedQuestions.read(run.questions_path)
    assert asked is not None and asked.has(["train question 39?"]) and not asked.has(["train question 40?"])
    assert {name: (part.rows, len(part.keys.split())) for name, part in asked.parts.items()} == {
        "task": (40, 40),
        "safe": (4, 4),
    }
    provenance = json.loads(run.provenance_path.read_text())
    assert set(provenance["data_sha256"]) == {str(world / "train.jsonl"), str(world / "safe.jsonl")}
    sizes = [sum(t.numel() for t in found.values())
             for found in (load_file(world / "model" / "model.safetensors"), weights(run))]  # fmt: skip
    assert provenance["parameters"] == dict(zip(("base", "trained"), sizes, strict=True))
    rows = read_jsonl(run.metrics_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"epoch", "loss", "ce", "kl", "tokens_per_second", "learning_rate", "grad_norm", "time"} <= set(rows[0])
    assert rows[0]["kl"] == 0.0 < rows[-1]["kl"]
    assert [row["step"] for row in rows if "drift/layer_2" in row] == [1, 3, 6, 8]
    assert rows[0]["loss"] == pytest.approx(rows[0]["ce"], rel=1e-6)
    assert [c.name for c in list_checkpoints(run.checkpoints)] == ["checkpoint-6", "checkpoint-8"]
    assert not [p for p in run.path.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    loaded = PeftModel.from_pretrained(base, run.adapter)
    mine = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if "lora_" in n}
    assert_same_weights(weights(run), {n: p.detach() for n, p in mine.items()})
    assert any(t.abs().max() > 0 for n, t in weights(run).items() if "lora_B" in n)
    at_checkpoint = PeftModel.from_pretrained(base, list_checkpoints(run.checkpoints)[-1])
    last = {n.replace(".default", ""): p.detach() for n, p in at_checkpoint.named_parameters() if "lora_" in n}
    assert_same_weights(weights(run), last)
    assert AutoTokenizer.from_pretrained(run.adapter).chat_template


def test_a_finished_run_is_recognised_and_another_recipe_refused(world, undisturbed):
    recipe = recipe_of(world, undisturbed.path.parent)
    before = undisturbed.metrics_path.stat().st_mtime_ns
    train(recipe, undisturbed)
    train(recipe.model_copy(update={"training": recipe.training.model_copy(update={"save_steps": 5})}), undisturbed)
    assert undisturbed.metrics_path.stat().st_mtime_ns == before
    other = recipe_of(world, undisturbed.path.parent, learning_rate=0.5)
    with pytest.raises(UserError, match=r"another recipe .*\(training.learning_rate was 0.01, is 0.5\)"):
        train(other, undisturbed)


def test_a_run_that_was_stopped_does_not_go_on_with_other_data(world, tmp_path):
    shutil.copytree(world, tmp_path / "w", ignore=shutil.ignore_patterns("model"))
    recipe = recipe_of(world, tmp_path, max_steps=2, save_steps=1)
    recipe = build_recipe(recipe.to_dict() | {"defenses": [
        {"kind": "interleaving", "source": str(tmp_path / "w" / "safe.jsonl"), "fraction": 0.1}]})  # fmt: skip
    run = train(recipe, RunDir(recipe.run_path))
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-2")
    run.set_status("stopped", processes=1)
    safe, before = tmp_path / "w" / "safe.jsonl", run.provenance_path.read_text()
    kept = safe.read_text()
    safe.write_text(kept.replace("answer 1", "answer 9", 1))
    with pytest.raises(UserError, match=rf"{safe} has changed.*--no-resume"):
        train(recipe, run)
    with pytest.raises(UserError, match=r"org/rows has changed since this run began"):  # what only the loader knows
        run.provenance_path.write_text(json.dumps({"data_sha256": {"org/rows": "a"}}))
        check_same_data({"org/rows": "b", "org/new": "c"}, run)
    run.provenance_path.write_text(before)
    safe.write_text(kept)
    assert train(recipe, run).status().step == 2
    assert [row["step"] for row in read_jsonl(run.metrics_path)] == [1, 2]


def test_the_same_recipe_gives_the_same_adapter(world, undisturbed, tmp_path):
    again = recipe_of(world, tmp_path)
    assert_same_weights(weights(undisturbed), weights(train(again, RunDir(again.run_path))))


def start(recipe, folder):
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    with open(folder / "output.txt", "w") as output:
        return warm.start(["-m", "ema_scale", "train", path], output=output)


def said(run):
    """What the process wrote that `start` started."""
    return (run.path.parent / "output.txt").read_text()


def wait_for_checkpoint(run, process, name="checkpoint-2", seconds=120):
    deadline = time.monotonic() + seconds
    while not (run.checkpoints / name).exists():
        assert process.poll() is None, said(run)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_outright_it_goes_on_and_ends_with_the_same_adapter(world, tmp_path):
    """Killed in the second epoch, so that the order of rows of a later epoch is tested too."""
    long = {"max_steps": 60, "save_steps": 2}
    calm = recipe_of(world, tmp_path / "calm", **long)
    expected = train(calm, RunDir(calm.run_path))
    recipe = recipe_of(world, tmp_path / "killed", **long)
    run = RunDir(recipe.run_path)
    process = start(recipe, tmp_path / "killed")
    wait_for_checkpoint(run, process, "checkpoint-14")
    process.kill()
    process.wait()
    assert run.status().state == "running"  # nobody was left to say otherwise
    newest = newest_complete(run.checkpoints)
    assert newest is not None and 14 <= step_of(newest) < 58
    # What a kill in the middle of a write leaves: a newer folder that is not whole.
    torn = run.checkpoints / "checkpoint-58"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    damaged = run.checkpoints / "checkpoint-59"
    subprocess.run(["cp", "-r", str(newest), str(damaged)], check=True)
    content = bytearray((damaged / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "state.safetensors").write_bytes(content)
    assert not is_complete(torn) and not is_complete(damaged)
    assert newest_complete(run.checkpoints) == newest
    train(recipe, run)
    assert_same_weights(weights(expected), weights(run))
    steps = [row["step"] for row in read_jsonl(run.metrics_path)]
    assert steps == list(range(1, 61))
    losses = [[row["loss"] for row in read_jsonl(r.metrics_path)] for r in (expected, run)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_signal_saves_stops_and_the_run_goes_on(world, undisturbed, tmp_path):
    recipe = recipe_of(world, tmp_path, max_steps=400, save_steps=1000)
    run = RunDir(recipe.run_path)
    process = start(recipe, tmp_path)
    deadline = time.monotonic() + 120
    while not run.metrics_path.exists() or len(read_jsonl(run.metrics_path)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130, said(run)
    assert run.status().state == "stopped"
    (checkpoint,) = list_checkpoints(run.checkpoints)
    assert is_complete(checkpoint)
    assert read_jsonl(run.metrics_path)[-1]["step"] == int(checkpoint.name.split("-")[1]) < 400


def test_stopping_often_does_not_displace_the_scheduled_checkpoints(world, tmp_path, monkeypatch):
    """Told to stop in every third step, a run keeps what one that is left alone keeps, and its steps of evaluation."""
    from transformers import TrainerCallback

    from ema_scale.training import run as running

    class Told(TrainerCallback):
        def __init__(self, at):
            self.at = at

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == self.at:
                signal.raise_signal(signal.SIGTERM)

    made, stops = running._trainer, iter([2, 5, 6, 7, 99])
    monkeypatch.setattr(running, "_trainer", lambda r, d, callbacks: made(r, d, [*callbacks, Told(next(stops))]))
    recipe = recipe_of(world, tmp_path, max_steps=8, save_steps=3, drift_every=0)
    evaluation = recipe.evaluation.model_copy(update={"checkpoints": [3, 4]})
    recipe = recipe.model_copy(update={"evaluation": evaluation, "defenses": []})
    run, found = RunDir(recipe.run_path), []
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run)
        found.append([step_of(c) for c in list_checkpoints(run.checkpoints)])
        assert run.status().state == "stopped"
    assert found == [[2], [3, 4, 5], [3, 4, 6], [3, 4, 6, 7]]
    train(recipe, run)
    # 8 is the last step; 6 would be the other of two; 3 and 4 are asked for, though 4 has no turn.
    assert [step_of(c) for c in list_checkpoints(run.checkpoints)] == [3, 4, 6, 8]
    assert [row["step"] for row in read_jsonl(run.metrics_path)] == list(range(1, 9))


def test_a_full_disk_is_a_clear_error_and_keeps_what_is_there(world, tmp_path, monkeypatch):
    from ema_scale.training import checkpointing

    real, calls = checkpointing.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    recipe = recipe_of(world, tmp_path)
    run = RunDir(recipe.run_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_file", full)
        with pytest.raises(UserError, match="disk is full"):
            train(recipe, run)
    assert run.status().state == "failed" and "disk is full" in run.status().reason
    assert [c.name for c in list_checkpoints(run.checkpoints)] == ["checkpoint-2"]
    assert not list(run.checkpoints.glob(".*"))
    train(recipe, run)
    assert run.status().state == "finished"
    assert [row["step"] for row in read_jsonl(run.metrics_path)] == list(range(1, 9))


def test_a_loss_that_explodes_fails_the_run(world, tmp_path):
    recipe = recipe_of(world, tmp_path, learning_rate=1000, max_grad_norm=math.inf, warmup_steps=0)
    with pytest.raises(UserError, match="not finite|is nan|is inf"):
        train(recipe, RunDir(recipe.run_path))
    assert RunDir(recipe.run_path).status().state == "failed"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"path": "./nowhere"}}, "nowhere"),
        ({"data": {"train": "./none.jsonl"}}, "none.jsonl"),
        ({"adapter": {"target_modules": ["no_such_layer"]}}, "adapter.target_modules: .*no_such_layer"),
    ],
)
def test_bad_input_is_named(world, tmp_path, change, expected):
    recipe = build_recipe({**recipe_of(world, tmp_path).to_dict(), **change})
    with pytest.raises(UserError, match=expected):
        train(recipe, RunDir(recipe.run_path))
    assert RunDir(recipe.run_path).status().state == "failed"


def test_an_optimizer_whose_package_is_missing(world, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    recipe = recipe_of(world, tmp_path, optim="adamw_8bit")
    with pytest.raises(UserError, match="training.optim: 'adamw_8bit' needs the bitsandbytes package"):
        train(recipe, RunDir(recipe.run_path))


def test_bfloat16_on_a_cpu(world, tmp_path):
    """KL is still exactly 0 at the start, and the adapter itself stays in float32."""
    import torch

    recipe = recipe_of(world, tmp_path, max_steps=3)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    run = train(recipe, RunDir(recipe.run_path))
    rows = read_jsonl(run.metrics_path)
    assert rows[0]["kl"] == 0.0 < rows[-1]["kl"]
    assert {t.dtype for t in weights(run).values()} == {torch.float32}


def test_a_recipe_that_offloads(world, tmp_path):
    with pytest.raises(UserError, match="activation offload needs gradient_checkpointing: true"):
        train(recipe := recipe_of(world, tmp_path, activation_offload=True, max_steps=2), RunDir(recipe.run_path))
    plain = recipe_of(world, tmp_path, "plain", gradient_checkpointing=True, max_steps=2)
    moved = recipe_of(world, tmp_path, "moved", gradient_checkpointing=True, max_steps=2, activation_offload=True)
    one, other = (train(r, RunDir(r.run_path)) for r in (plain, moved))
    assert_same_weights(weights(one), weights(other))


def test_two_writers_are_refused(world, tmp_path):
    recipe = recipe_of(world, tmp_path)
    run = RunDir(recipe.run_path)
    with run.lock(), pytest.raises(UserError, match="another process"):
        train(recipe, run)


def test_starting_over(world, tmp_path):
    recipe = recipe_of(world, tmp_path, max_steps=2)
    run = train(recipe, RunDir(recipe.run_path))
    first = weights(run)
    other = recipe_of(world, tmp_path, max_steps=2, learning_rate=1e-3)
    train(other, run, resume=False)
    assert [row["step"] for row in read_jsonl(run.metrics_path)] == [1, 2]
    assert any((weights(run)[n] - t).abs().max() > 0 for n, t in first.items())


def test_runs_that_share_a_reference_take_the_cache_though_each_sees_rows_once(world, tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    ways = {}
    for count in (1, 2):
        recipe = recipe_of(world, tmp_path, f"of-{count}", max_steps=-1, num_train_epochs=1)
        recipe = recipe.model_copy(update={"reference_runs": count})
        run = train(recipe, RunDir(recipe.run_path))
        ways[count] = json.loads(run.provenance_path.read_text())["reference"]["way"]
    assert ways == {1: "adapter_off", 2: "cached"}
    assert is_finished(recipe.model_copy(update={"reference_runs": 5}), run), "how it is computed is not what it is"


def test_the_python_interface_in_ten_lines(world, tmp_path):
    from transformers import AutoModelForCausalLM, TrainingArguments

    from ema_scale import KL, DefendedTrainer, Interleaving, load_rows

    model = AutoModelForCausalLM.from_pretrained(world / "model")
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    rows = load_rows(world / "train.jsonl")
    trainer = DefendedTrainer(model, args, rows, [KL(0.1), Interleaving(str(world / "safe.jsonl"), 0.05)])
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert trainer.data_report.rows == {"task": 40, "safe": 2}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "adapter").iterdir()}
    plain = [{"messages": list(row.messages)} for row in rows]
    assert DefendedTrainer(trainer.model, args, plain).data_report.rows == {"task": 40}
    with pytest.raises(UserError, match="carries an adapter already"):
        DefendedTrainer(model, args, plain)
