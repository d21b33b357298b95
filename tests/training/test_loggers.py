"""One history per run in the loggers, however often it is killed and resumed."""

import os

import pytest

from ema_scale.core.run_dir import RunDir
from ema_scale.training.loggers import logger_environment
from ema_scale.training.run import train
from tests.training.test_run import recipe_of, world

__all__ = ["world"]


class _Killed(BaseException):
    pass


def test_steps_that_a_resumed_run_repeats_stand_once_in_tensorboard(world, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    recipe = recipe_of(world, tmp_path, max_steps=6, save_steps=2, report_to=["tensorboard"])
    run, logged = RunDir(recipe.run_path), TensorBoardCallback.on_log

    def killed_after(self, args, state, control, **kwargs):
        logged(self, args, state, control, **kwargs)
        if state.global_step == 5:
            self.tb_writer.flush()
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardCallback, "on_log", killed_after)
        with pytest.raises(_Killed):
            train(recipe, run)
    train(recipe, run)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_wandb_is_told_the_same_run_after_a_resume_and_another_one_if_it_starts_over(tmp_path, monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    run = RunDir(tmp_path / "run").create()

    def told(started):
        run.set_status("running", started=started)
        with logger_environment(run):
            assert (os.environ["WANDB_RESUME"], os.environ["WANDB_NAME"]) == ("allow", "run")
            return os.environ["WANDB_RUN_ID"]

    first = told(1.0)
    assert told(1.0) == first != told(2.0) and "WANDB_RUN_ID" not in os.environ
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert told(1.0) == "mine" and os.environ["WANDB_RUN_ID"] == "mine"
