"""A run that is killed after its last checkpoint ends with the same adapter, and takes no step more."""

import pytest

from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.defenses.registry import parse
from ema_scale.training.run import train
from ema_scale.training.trainer import DefendedTrainer
from tests.training.test_run import assert_same_weights, recipe_of, weights, world

__all__ = ["world"]
STOPPING = {"kind": "early_stopping", "measure": "kl", "limit": 1e-9, "window": 3}


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("stopping", [[], [STOPPING]])
def test_it_takes_no_step_more(world, tmp_path, monkeypatch, stopping):
    def recipe(name):
        # At a constant rate: under a decay to 0 one more step would change nothing.
        training = {"max_steps": 6, "save_steps": 1, "lr_scheduler_type": "constant"}
        made = recipe_of(world, tmp_path, name, **training)
        return made.model_copy(update={"defenses": [*made.defenses, *parse(stopping)]})

    calm = train(recipe("calm"), RunDir(tmp_path / "calm"))
    assert (calm.status().step, calm.status().stopped_early is not None) == (3 if stopping else 6, bool(stopping))

    def killed(*_, **__):
        raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(DefendedTrainer, "save_model", killed)
        train(recipe("killed"), RunDir(tmp_path / "killed"))
    run = train(recipe("killed"), RunDir(tmp_path / "killed"))
    assert (run.status().step, run.status().stopped_early) == (calm.status().step, calm.status().stopped_early)
    steps = [[row["step"] for row in read_jsonl(r.metrics_path)] for r in (calm, run)]
    assert steps[0] == steps[1]
    assert_same_weights(weights(calm), weights(run))
