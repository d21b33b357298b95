"""Two engines of one evaluation, as tasks of an array on a real Slurm."""

import os
import shutil

import pytest

from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation.records import Summary
from ema_scale.recipe import build_recipe
from ema_scale.slurm.site import EvaluationSite, Site
from ema_scale.slurm.submit import evaluation_job, jobs_of, ranks_log_of, submit
from ema_scale.study.evaluate import evaluate_run
from ema_scale.training.run import train
from tests.slurm.helpers import environment, everything
from tests.training.test_run import recipe_of, world

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
__all__ = ["world"]


def rows(run, name):
    return sorted(read_jsonl(run.eval_dir / name), key=lambda row: row["key"])


def test_an_array_of_two_engines_gives_the_rows_and_the_summary_of_one(slurm, world, tmp_path, monkeypatch):
    values = recipe_of(world, tmp_path, max_steps=2).to_dict()
    values["evaluation"] = {
        "suites": {"general": ["smallworld:suite/general?size=tiny"]}, "judge": {"kind": "smallworld"},
        "sampler": "transformers", "max_tokens": 4, "samples_per_question": 2, "compare_base": False,
    }  # fmt: skip
    recipe = build_recipe(values)
    run, alone = RunDir(recipe.run_path), RunDir(tmp_path / "alone" / recipe.name)
    train(recipe, run)
    shutil.copytree(run.path, alone.path)
    for name, value in environment(slurm).items():
        monkeypatch.setenv(name, value)
    site = Site(gpus_per_node=0, time="10:00", evaluation=EvaluationSite(engines=2, gpus=0, time="10:00"))
    array = submit(recipe, evaluation_job(recipe.name, run.path, site, [recipe]))
    assert [row["job"] for row in jobs_of(run)] == [f"{array}_0"], "the task that stores and judges stands for all"
    assert {slurm.wait(f"{array}_{task}")["JobState"] for task in (0, 1)} == {"COMPLETED"}, everything(run)
    assert "this engine answered" in ranks_log_of(run, {"what": "eval", "job": f"{array}_1"}).read_text()
    assert not (run.path / "engines").exists()
    evaluate_run(alone.path)
    assert os.listdir(run.eval_dir) and rows(run, "samples.jsonl") == rows(alone, "samples.jsonl")
    assert rows(run, "judgements.jsonl") == rows(alone, "judgements.jsonl")
    found = [Summary.read(one.eval_dir / "summary.json") for one in (run, alone)]
    assert len({one.model_copy(update={"seconds": 0.0, "adapter": None}).model_dump_json() for one in found}) == 1
