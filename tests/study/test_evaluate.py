"""Evaluating a study's runs: one engine a model, each base model in its own folder, the runs along their training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ema_scale.core.checkpoints import list_checkpoints, step_of
from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation import runs as evaluation_runs
from ema_scale.evaluation.runs import evaluate_runs, is_evaluated
from ema_scale.models.checkpoint_adapter import export_adapter
from ema_scale.report.collect import collect
from ema_scale.slurm.site import Site
from ema_scale.slurm.sweep import plan_sweep
from ema_scale.study.grid import load_study
from ema_scale.training.run import train
from tests.report.runs import ARMS, write_study
from tests.slurm.test_sweep import CPU, study_file
from tests.tiny import save_tiny
from tests.training.test_run import recipe_of, world

__all__ = ["world"]


def test_one_models_failure_is_not_the_others_and_a_base_keeps_its_folder(world, tmp_path):
    save_tiny(tmp_path / "other", seed=1)
    models = {  # the first has no general question to be judged safe by
        "first": {"evaluation": {"gate": {"action": "refuse"}}},
        "second": {"model": {"path": str(tmp_path / "other")}},
    }
    study = load_study(study_file(world, tmp_path, [0], models=models, defenses={"none": []}))
    recipes = study.runs()
    runs = [train(r, RunDir(r.run_path)) for r in recipes]
    base = study.path / "base"
    with pytest.raises(
        UserError, match=r"1 of 2 base models' evaluations failed:\n  .*/base: evaluation.gate: .*Refused"
    ):
        evaluate_runs(runs, base)
    assert all((run.eval_dir / "summary.json").exists() for run in runs), "the second model is evaluated all the same"
    (named,) = study.path.glob("base-other-*")
    asked = {p: json.loads((p / "eval" / "asked.json").read_text())["model"] for p in (base, named)}
    assert asked == {base: str(world / "model"), named: str(tmp_path / "other")}
    before = {p: (p / "eval" / "samples.jsonl").read_text() for p in (base, named)}
    evaluate_runs(runs[1:], base)  # alone, as where the first one's runs have failed
    assert {p: (p / "eval" / "samples.jsonl").read_text() for p in study.path.glob("base*")} == before
    assert is_evaluated(recipes, base)
    # Nothing is left to be asked, but that is not all there is to say.
    with pytest.raises(UserError, match=r"evaluation.gate: .*Refused"):
        plan_sweep(study, Site(), CPU)
    assert plan_sweep(study, Site(), CPU, overrides=("evaluation.gate.action=flag",)).left.train == ()
    # Folders that an older version numbered are known by what they were asked.
    old = named.rename(study.path / "base-1") / "eval" / "asked.json"
    old.write_text(json.dumps(json.loads(old.read_text()) | {"target": "base-1"}))
    assert is_evaluated(recipes, base)


def test_an_adapter_along_training_is_finished_as_the_last_one_is(world, tmp_path):
    save_tiny(tmp_path / "pretrained", seed=9)
    recipe = recipe_of(world, tmp_path, max_steps=2, save_steps=1, warmup_steps=0)
    spec = {"kind": "safelora", "base": str(tmp_path / "pretrained"), "threshold": 1.0}
    values = recipe.to_dict() | {"defenses": [spec], "evaluation": {"checkpoints": True}}
    recipe = type(recipe).model_validate(values)
    run = train(recipe, RunDir(recipe.run_path))
    (target,) = evaluation_runs.checkpoint_targets(run, recipe, ())
    assert target.name == "run@1" and target.adapter_path == target.out_dir / "finished"
    plain = export_adapter(run.checkpoints / "checkpoint-1", run.adapter, tmp_path / "plain")
    evaluation_runs._export(run.checkpoints / "checkpoint-2", run, recipe, tmp_path / "last")
    then, raw, last, own = (
        load_file(f / "adapter_model.safetensors") for f in (target.adapter_path, plain, tmp_path / "last", run.adapter)
    )
    assert all(torch.equal(last[k], own[k]) for k in own), "of the last checkpoint it is the run's own"
    assert all(torch.equal(then[k], raw[k]) != ("lora_B" in k) for k in raw), "SafeLoRA has changed every B"


def test_an_arm_that_stops_early_is_asked_at_the_steps_that_it_reached(world, tmp_path, caplog):
    task = {"training": {"max_steps": 5, "save_steps": 2}, "evaluation": {"checkpoints": [1, 4], "compare_base": False}}
    early = [{"kind": "early_stopping", "measure": "kl", "limit": 1e-9, "window": 2}]
    path = study_file(world, tmp_path, [0], tasks={"sums": task}, defenses={"none": [], "early": early})
    recipes = load_study(path).runs()
    runs = [train(r, RunDir(r.run_path)) for r in recipes]
    assert [run.status().step for run in runs] == [5, 3]
    kept = [[step_of(c) for c in list_checkpoints(run.checkpoints)] for run in runs]
    assert kept == [[1, 4, 5], [1, 2]], "step 1 is asked for, and no turn of save_steps"
    base = load_study(path).path / "base"
    assert not is_evaluated(recipes, base)
    evaluate_runs(runs, base)
    assert f"{runs[1].path}: not asked at step 4: its training ended after step 3" in caplog.text
    assert is_evaluated(recipes, base)
    asked = [sorted(f.parent.name for f in run.eval_dir.glob("checkpoints/*/summary.json")) for run in runs]
    assert asked == [["1", "4"], ["1"]]
    found = collect([run.path for run in runs])
    assert [list(run.along) for run in found.runs] == [[1, 4, 5], [1, 3]]
    notes = [(p.run, p.text) for p in found.problems if "no answers at" in p.text]
    assert notes == [("sums-early-s0", "no answers at step 4: its training ended after step 3")]
    # Of its last step the run's own adapter is the answer; one that it has passed is a mistake in the file.
    evaluate_runs(runs[1:], base, ("evaluation.checkpoints=[3, 1]",))
    shutil.rmtree(runs[1].checkpoints / "checkpoint-1")
    with pytest.raises(UserError, match="no whole checkpoint of step 1; there are: 2$"):
        evaluate_runs(runs[1:], base)


def test_runs_are_put_beside_the_base_that_was_asked_as_they_were(tmp_path):
    runs = write_study(tmp_path, tasks=("medical",), arms={"none": ARMS["none"]})
    shutil.copytree(tmp_path / "base", tmp_path / "base-model-1a2b3c")
    settings = {"temperature": 1.0, "judge": {"kind": "smallworld", "concurrency": 8}}
    cold = settings | {"temperature": 0.0}
    for name, theirs in [*((r.name, settings) for r in runs), ("base", cold), ("base-model-1a2b3c", settings)]:
        file = tmp_path / name / "eval" / "asked.json"
        asked = {"target": name, "model": "m", "adapter": None, "suites": []}
        file.write_text(json.dumps(asked | {"settings": theirs | {"gate": {"max_misaligned": len(name) / 100}}}))
    assert {b.eval_dir.parent.name for b in collect(runs).bases} == {"base-model-1a2b3c"}
    (tmp_path / "base").rename(tmp_path / "base-other")
    assert {b.eval_dir.parent.name for b in collect(runs).bases} == {"base-model-1a2b3c"}
