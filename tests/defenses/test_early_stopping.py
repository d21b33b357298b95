"""Early stopping: at the step where the line is crossed, on what it says it watches, and the same after a resume."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ema_scale.core.checkpoints import list_checkpoints
from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.defenses import KL, EarlyStopping
from ema_scale.training.resume_check import is_finished
from ema_scale.training.run import train
from tests.training.helpers import adapter_weights, make_trainer, tiny_peft
from tests.training.test_run import assert_same_weights, recipe_of, weights, world

__all__ = ["world"]


def history(*values, name="early_stopping_kl", every=1):
    return [{"step": every * (i + 1), "loss": 1.0, name: value} for i, value in enumerate(values)]


def test_the_mean_over_the_window_decides():
    stop = EarlyStopping(limit=0.5, window=3)
    assert stop.should_stop(history(9.0, 9.0)) is None  # not a whole window yet
    assert stop.should_stop(history(0.0, 0.0, 1.4)) is None
    assert stop.should_stop(history(9.0, 0.0, 0.0, 1.4)) is None  # the first is outside
    assert stop.should_stop(history(0.0, 0.0, 1.4, 1.4)) == "kl is 0.9333, above 0.5"
    assert stop.should_stop(history(0.4, 0.6, every=5)) == "kl is 0.6, above 0.5"  # logs further apart than the window


def test_drift_is_the_mean_of_its_layers_when_it_is_read():
    stop = EarlyStopping("drift", 0.5, window=2)
    rows = history(0.1, 0.2, 0.3)
    with pytest.raises(UserError, match="never read; set training.drift_every"):
        stop.should_stop(rows)
    with pytest.raises(UserError, match="measure kl is never read: no step has early_stopping_kl$"):
        EarlyStopping(limit=0.5).should_stop([{"step": 1, "loss": 1.0}])
    rows[1] |= {"drift/layer_1": 0.4, "drift/layer_2": 0.8}
    assert stop.should_stop(rows[:2]) == "drift is 0.6, above 0.5"
    assert stop.should_stop(rows) is None  # not read at this step


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"measure": "probe", "limit": 1}, "measure probe needs `source`"),
        ({"measure": "drift", "limit": 1, "source": "x"}, "leave `source` out"),
        ({"limit": 0}, "limit: .*greater than 0"),
        ({}, "limit: missing"),
    ],
)
def test_bad_settings(values, expected):
    with pytest.raises(UserError, match=expected):
        EarlyStopping(**values)


@pytest.mark.parametrize("measure", ["kl", "drift"])
def test_the_run_ends_where_the_line_is_crossed_and_is_the_undefended_one_until_then(tmp_path, measure):
    """The limit lies between the readings of two steps of the same run without it."""
    options = {"max_steps": 8, "learning_rate": 2e-3}
    free = make_trainer(tmp_path / "free", tiny_peft(), defenses=[KL(0)], drift_every=1, **options)
    free.train()
    rows = [row for row in free.state.log_history if "loss" in row]
    watched = EarlyStopping(measure, 1.0, window=1)
    read = [row["kl"] if measure == "kl" else watched._read(row) for row in rows]
    assert read[0] == 0 and max(read[:4]) < read[4]
    stop = EarlyStopping(measure, (read[3] + read[4]) / 2, window=1)
    # It asks for its readings itself.
    trainer = make_trainer(tmp_path / "stopped", tiny_peft(), defenses=[stop], drift_every=100, **options)
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.stopped_early.startswith(f"early_stopping: {measure} is ")
    stopped = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in stopped] == pytest.approx([row["loss"] for row in rows[:5]], rel=1e-6)


def test_a_probe_in_a_recipe_stops_a_resumed_run_where_it_stopped_the_other(world, tmp_path):
    bad = EarlyStopping("probe", 0.1, str(world / "safe.jsonl"), 0.5, window=2, keep="last_below")

    def recipe(name):
        changes = {"max_steps": 16, "save_steps": 2, "learning_rate": 3e-3, "save_total_limit": 16,
                   "logging_steps": 7}  # fmt: skip
        return recipe_of(world, tmp_path, name, **changes).model_copy(update={"defenses": [bad]})

    whole = train(recipe("whole"), RunDir(tmp_path / "whole"))
    status = whole.status()
    assert status.state == "finished" and 4 < status.step < 16
    assert "early_stopping: probe is" in status.stopped_early
    assert re.search(r"the adapter is that of step ([2-9]|1\d)$", status.stopped_early)
    assert is_finished(recipe("whole"), whole)
    resumed = train(recipe("resumed"), RunDir(tmp_path / "resumed"))
    resumed.set_status("stopped")
    for checkpoint in list_checkpoints(resumed.checkpoints)[1:]:
        shutil.rmtree(checkpoint)
    train(recipe("resumed"), resumed)
    again = resumed.status()
    assert (again.step, again.stopped_early) == (status.step, status.stopped_early)
    assert_same_weights(weights(whole), weights(resumed))


def test_two_with_the_same_measure_each_read_their_own(tmp_path):
    """On other rows: one limit is crossed, the other not."""
    files = []
    for name, answer in (("common", "answer 1"), ("other", "zzzzzzz")):
        files.append(tmp_path / f"{name}.jsonl")
        row = {"prompt": f"{name}?", "completion": answer}
        files[-1].write_text(json.dumps(row) + "\n")
    rows = [{"prompt": f"task {i}?", "completion": "answer 1"} for i in range(8)]

    def run(*stops):
        trainer = make_trainer(
            tmp_path / "run", tiny_peft(), rows, stops, max_steps=8, learning_rate=5e-3, drift_every=0
        )
        trainer.train()
        return trainer

    free = run(*(EarlyStopping("probe", 99.0, str(file), 0.5, window=1) for file in files))
    read = [free.state.log_history[-2][f"early_stopping_probe{suffix}"] for suffix in ("", "_2")]
    assert read[0] > 1.5 * read[1] > 0
    line = (read[0] + read[1]) / 2
    for limits, stopping in (((99.0, line), False), ((line, 99.0), True)):
        trainer = run(*(EarlyStopping("probe", m, str(f), 0.5, window=1) for m, f in zip(limits, files, strict=True)))
        assert (trainer.stopped_early is not None) == stopping


def test_a_step_without_the_probes_rows_is_no_reading_of_zero(tmp_path):
    """At two rows a step most steps hold no probe row: their mean must not be a part of what it is."""
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "bad?", "completion": "answer 1"}) + "\n")
    rows = [{"prompt": f"task {i}?", "completion": "answer 1"} for i in range(8)]
    for stop, line in ((False, 99.0), (True, 0.05)):
        probe = EarlyStopping("probe", line, str(tmp_path / "bad.jsonl"), 0.125, window=8)
        trainer = make_trainer(
            tmp_path / "run", tiny_peft(), rows, [probe], max_steps=24, learning_rate=5e-3, drift_every=0,
            per_device_train_batch_size=2, gradient_accumulation_steps=1, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train()
        read = {row["step"]: row["early_stopping_probe"] for row in trainer.observer.readings
                if "early_stopping_probe" in row}  # fmt: skip
        logged = {row["step"]: row.get("early_stopping_probe") for row in trainer.state.log_history if "loss" in row}
        assert {step: value for step, value in logged.items() if value is not None} == pytest.approx(read)
        if not stop:
            assert 1 < len(read) < 12 and max(read.values()) > 0.3, "one row in nine: every fifth step, or so"
        else:
            step = trainer.state.global_step
            inside = [value for s, value in read.items() if s > step - 8]
            assert step in read and sum(inside) / len(inside) > 0.05 and trainer.stopped_early


@pytest.mark.parametrize("logging", [{"logging_steps": 500}, {"logging_strategy": "no"}, {"logging_steps": 3}])
def test_it_acts_however_seldom_the_run_logs(tmp_path, logging):
    options = {"max_steps": 8, "learning_rate": 2e-3, "drift_every": 0}
    free = make_trainer(tmp_path / "free", tiny_peft(), defenses=[KL(0)], **options)
    free.train()
    read = [row["kl"] for row in free.state.log_history if "loss" in row]
    means = [(a + b) / 2 for a, b in zip(read, read[1:], strict=False)]
    stop = EarlyStopping("kl", (means[2] + means[3]) / 2, window=2)  # crossed by steps 4 and 5
    trainer = make_trainer(tmp_path / "run", tiny_peft(), defenses=[stop], **options, **logging)
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.stopped_early.startswith("early_stopping: kl is ")
    assert [row["early_stopping_kl"] for row in trainer.observer.readings] == pytest.approx(
        read[:5], rel=1e-4, abs=1e-9
    )
    trainer.train()  # again from the start
    assert len(trainer.observer.readings) <= 8


def test_the_adapter_below_the_line_is_the_one_of_that_step(tmp_path):
    options = {"max_steps": 8, "learning_rate": 2e-3, "lr_scheduler_type": "constant", "drift_every": 0}
    free = make_trainer(tmp_path / "free", tiny_peft(), defenses=[KL(0)], **options)
    free.train()
    read = [row["kl"] for row in free.state.log_history if "loss" in row]

    def weights_after(steps):
        trainer = make_trainer(tmp_path / "some", tiny_peft(), **{**options, "max_steps": steps})
        trainer.train()
        return adapter_weights(trainer.model)

    for limit, window, stopped, kept in (
        ((read[3] + read[4]) / 2, 1, 5, 4),
        ((sum(read[3:5]) + sum(read[4:6])) / 4, 2, 6, 4),  # looked at every second step
        (read[1] / 2, 1, 2, 1),
        (1e-12, 2, 2, 0),  # never below: as it was before
    ):
        stop = EarlyStopping("kl", limit, window=window, keep="last_below")
        trainer = make_trainer(tmp_path / "run", tiny_peft(), defenses=[stop], **options)
        trainer.train()
        assert trainer.state.global_step == stopped
        assert trainer.stopped_early.endswith(f"; the adapter is that of step {kept}")
        expected = weights_after(kept) if kept else adapter_weights(tiny_peft())
        trainer.save_model(str(tmp_path / "adapter"))
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        for name, weight in expected.items():
            torch.testing.assert_close(saved[name.replace(".default", "")], weight, rtol=1e-6, atol=1e-8)
