"""Early stopping: at the step where the line is crossed, on what it says it watches, and the same after a resume."""

import shutil

import pytest

from ema_scale.defenses import KL, EarlyStopping
from ema_scale.errors import UserError
from ema_scale.rundir import RunDir
from ema_scale.training.checkpointing import list_checkpoints
from ema_scale.training.identity import is_finished
from ema_scale.training.run import train
from tests.training.helpers import make_trainer, tiny_peft
from tests.training.test_run import assert_same_weights, recipe_of, weights, world

__all__ = ["world"]


def history(*values, name="early_stopping_kl", every=1):
    return [{"step": every * (i + 1), "loss": 1.0, name: value} for i, value in enumerate(values)]


def test_the_mean_over_the_window_decides():
    stop = EarlyStopping(limit=0.5, window=3)
    assert stop.observe(history(9.0, 9.0)) is None  # not a whole window yet
    assert stop.observe(history(0.0, 0.0, 1.4)) is None
    assert stop.observe(history(9.0, 0.0, 0.0, 1.4)) is None  # the first is outside
    assert stop.observe(history(0.0, 0.0, 1.4, 1.4)) == "kl is 0.9333, above 0.5"
    assert stop.observe(history(0.4, 0.6, every=5)) == "kl is 0.6, above 0.5"  # logs further apart than the window


def test_drift_is_the_mean_of_its_layers_when_it_is_read():
    stop = EarlyStopping("drift", 0.5, window=2)
    rows = history(0.1, 0.2, 0.3)
    with pytest.raises(UserError, match="never read; set training.drift_every"):
        stop.observe(rows)
    rows[1] |= {"drift/layer_1": 0.4, "drift/layer_2": 0.8}
    assert stop.observe(rows[:2]) == "drift is 0.6, above 0.5"
    assert stop.observe(rows) is None  # not read at this step


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
    options = {"max_steps": 8, "drift_every": 1, "learning_rate": 2e-3}
    free = make_trainer(tmp_path / "free", tiny_peft(), defenses=[KL(0)], **options)
    free.train()
    rows = [row for row in free.state.log_history if "loss" in row]
    watched = EarlyStopping(measure, 1.0, window=1)
    read = [row["kl"] if measure == "kl" else watched._read(row) for row in rows]
    assert read[0] == 0 and max(read[:4]) < read[4]
    stop = EarlyStopping(measure, (read[3] + read[4]) / 2, window=1)
    trainer = make_trainer(tmp_path / "stopped", tiny_peft(), defenses=[stop], **options)
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.stopped_early.startswith(f"early_stopping: {measure} is ")
    stopped = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in stopped] == pytest.approx([row["loss"] for row in rows[:5]], rel=1e-6)


def test_a_probe_in_a_recipe_stops_a_resumed_run_where_it_stopped_the_other(world, tmp_path):
    bad = EarlyStopping("probe", 0.1, str(world / "safe.jsonl"), 0.5, window=2)

    def recipe(name):
        changes = {"max_steps": 16, "save_steps": 2, "learning_rate": 3e-3, "keep_checkpoints": 16}
        return recipe_of(world, tmp_path, name, **changes).model_copy(update={"defenses": [bad]})

    whole = train(recipe("whole"), RunDir(tmp_path / "whole"))
    status = whole.status()
    assert status["state"] == "finished" and 4 < status["step"] < 16
    assert "early_stopping: probe is" in status["stopped_early"]
    assert is_finished(recipe("whole"), whole)
    resumed = train(recipe("resumed"), RunDir(tmp_path / "resumed"))
    resumed.set_status("stopped")
    for checkpoint in list_checkpoints(resumed.checkpoints)[1:]:
        shutil.rmtree(checkpoint)
    train(recipe("resumed"), resumed)
    assert resumed.status()["step"] == status["step"]
    assert_same_weights(weights(whole), weights(resumed))
