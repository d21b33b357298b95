"""What a study makes before its runs, by real commands."""

import shlex

import pytest
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.study.grid import load_study
from ema_scale.study.prepare import Preparation, missing, prepare
from ema_scale.study.run_local import run_study
from tests.slurm.test_sweep import study_file
from tests.training.test_run import world

__all__ = ["world"]


def test_a_study_makes_what_its_runs_read_and_only_once(world, tmp_path):
    rows = tmp_path / "rows.jsonl"
    step = {"run": f"ema data operator-swap 1 --rows 12 --out {shlex.quote(str(rows))}", "makes": str(rows)}
    tasks = {"swap": {"data": {"train": str(rows)}}}
    path = study_file(world, tmp_path, [0], tasks=tasks, defenses={"none": []}, prepare=[step])
    for command in (["study"], ["sweep", "--slurm", "--gpus-per-node", "0"]):
        said = CliRunner().invoke(app, [*command, str(path), "--dry-run"])
        assert said.exit_code == 0 and f"# first, for {rows}: {step['run']}\n" in said.output, said.output
        assert f"\nto be made: data.train: {rows} (run swap-none-s0), by {step['run']}\n" in said.output
        assert "NOT FOUND" not in said.output
    assert not rows.exists()
    study = load_study(path)
    run_study(study)
    (recipe,) = study.runs()
    assert RunDir(recipe.run_path).status().state == "finished"
    before = rows.stat().st_mtime_ns
    run_study(study)
    assert rows.stat().st_mtime_ns == before
    # Made again, it must still be what the finished run was trained on.
    rows.unlink()
    run_study(study)
    other = Preparation(run=[*study.prepare[0].run, "--seed", "5"], makes=str(rows))
    rows.unlink()
    with pytest.raises(UserError, match=f"swap-none-s0: {rows} has changed"):
        run_study(study.model_copy(update={"prepare": [other]}))


def test_a_step_that_fails_or_makes_something_else_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = Preparation(run="ema data operator-swap 9 --out x.jsonl", makes="x.jsonl")
    other = Preparation(run="ema data --help", makes=str(tmp_path / "y"))
    assert missing([bad, Preparation(run="ema x", makes=".")]) == [bad]
    with pytest.raises(UserError, match=r"study s: prepare: exit code 2 of: ema data operator-swap 9 --out x.jsonl"):
        prepare([bad], "study s")
    with pytest.raises(UserError, match=r"study s: prepare: found no .*/y after: ema data --help"):
        prepare([other], "study s")


def test_only_our_own_commands_and_paths_beside_the_study(world, tmp_path):
    step = {"run": ["ema", "train", "../x.yaml"], "makes": "runs/x"}
    (found,) = load_study(study_file(world, tmp_path, [0], prepare=[step])).prepare
    assert found.run == ["ema", "train", str(tmp_path.parent / "x.yaml")] and found.makes == "runs/x"
    with pytest.raises(UserError, match="prepare.0.run: expected an ema command"):
        load_study(study_file(world, tmp_path, [0], prepare=[{"run": "rm -rf x", "makes": "y"}]))
    with pytest.raises(UserError, match="unknown key 'prepare.0.make'; did you mean 'makes'"):
        load_study(study_file(world, tmp_path, [0], prepare=[{"run": "ema x", "make": "y"}]))
