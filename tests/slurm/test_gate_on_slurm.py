"""A base model that is refused, or not, before anything is trained on it: on a real Slurm."""

import pytest
import yaml

from ema_scale.core.run_dir import RunDir
from ema_scale.recipe import build_recipe
from ema_scale.slurm.submit import jobs_of
from ema_scale.study.grid import load_study
from tests.slurm.helpers import attempt, ema, environment, everything
from tests.slurm.test_sweep import study_file
from tests.training.test_run import recipe_of, world

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
__all__ = ["world"]


def refused(*command, env):
    done = attempt(*command, env=env)
    assert done.returncode == 2 and "Refused" in done.stderr and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_study_whose_base_is_refused_trains_nothing(slurm, world, tmp_path):
    env = environment(slurm)
    # Its only suite is a benign one: nothing shows that the base is safe.
    path = study_file(world, tmp_path, [0])
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["evaluation"]["gate"] = {"action": "refuse"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = load_study(path)
    folder, command = RunDir(study.path), ("sweep", path, "--slurm", "--gpus-per-node", 0, "--time", "10:00")
    ema(*command, env=env)
    gate, array, evaluation, report = (row["job"] for row in jobs_of(folder))
    assert [row["what"] for row in jobs_of(folder)] == ["gate", "train", "eval", "report"]
    assert slurm.wait(gate)["JobState"] == "FAILED", everything(folder)
    assert "was not checked" in ema("logs", folder.path, "--job", "gate", env=env)
    for job in (array, evaluation, report):
        assert slurm.wait(job)["JobState"] == "CANCELLED", everything(folder)
    assert f"gate {gate} FAILED" in ema("status", folder.path, env=env)
    assert not list(folder.path.glob("*/adapter")) and not list(folder.path.glob("*/status.json"))
    assert "evaluation.gate.action=flag" in refused(*command, env=env), "known now: nothing is submitted"
    assert len(jobs_of(folder)) == 4


def test_a_run_waits_for_its_gate(slurm, world, tmp_path):
    env = environment(slurm)
    values = recipe_of(world, tmp_path, max_steps=2).to_dict()
    values["evaluation"] = {
        "suites": {"general": ["smallworld:suite/general?size=tiny"]}, "judge": {"kind": "smallworld"},
        "sampler": "transformers", "max_tokens": 4, "samples_per_question": 1,
        "gate": {"action": "refuse", "max_misaligned": 0.001},
    }  # fmt: skip
    recipe = build_recipe(values)
    path, run = tmp_path / "one.yaml", RunDir(recipe.run_path)
    path.write_text(recipe.to_yaml())
    command = ("launch", path, "--gpus-per-node", 0, "--time", "10:00")
    ema(*command, env=env)
    gate, training = (row["job"] for row in jobs_of(run))
    assert slurm.wait(gate)["JobState"] == "FAILED", everything(run)  # no interval ends there
    assert slurm.wait(training)["JobState"] == "CANCELLED" and not run.adapter.exists(), everything(run)
    assert "the line is 0.1 %" in refused(*command, env=env)
    # Another line, and longer answers, which must be asked for: the training starts when the gate has said so.
    other = ("evaluation.gate.max_misaligned=0.99", "evaluation.max_tokens=5")
    ema(*command, *other, env=env)
    gate, training = (row["job"] for row in jobs_of(run)[2:])
    assert slurm.wait(gate)["JobState"] == slurm.wait(training)["JobState"] == "COMPLETED", everything(run)
    assert run.status().state == "finished"
    assert "The reference passes its gate" in ema("gate", path, *other, env=env)
    assert "The reference was not shown to be safe" in refused("gate", path, env=env)
    assert "The reference was not shown to be safe" in refused("train", path, "name=run", env=env)
