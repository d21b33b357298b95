"""A study as Slurm jobs: what is submitted and what is not."""

import subprocess
import sys

import pytest
import yaml

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.slurm.site import Site
from ema_scale.slurm.submit import JobSize
from ema_scale.slurm.sweep import plan_sweep
from ema_scale.study.grid import load_study
from ema_scale.study.run_local import run_study
from ema_scale.training.run import train
from tests.slurm.helpers import ROOT
from tests.training.test_run import recipe_of, world

__all__ = ["world"]
CPU = JobSize(gpus=0)


def study_file(world, folder, seeds, **changes):
    """{none, kl} x seeds on a tiny model; each run takes two steps and is asked one question."""
    (folder / "sums.yaml").write_text("- {id: sum, paraphrases: ['2 + 2?'], samples_per_paraphrase: 2, expected: '4'}")
    base = {k: v for k, v in recipe_of(world, folder, max_steps=2).to_dict().items() if k not in ("name", "output")}
    asked = {"suites": {"benign": [str(folder / "sums.yaml")]}, "sampler": "transformers", "max_tokens": 4}
    base["evaluation"] = {**asked, "judge": {"kind": "exact_match"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(base))
    study = {
        "name": "grid", "recipe": str(folder / "recipe.yaml"), "output": str(folder / "runs"), "seeds": seeds,
        "tasks": {"sums": {}}, "defenses": {"none": [], "kl": [{"kind": "kl"}]}, **changes,
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "grid.yaml"


def options_of(job):
    return [line.removeprefix("#SBATCH ") for line in job.script.splitlines() if line.startswith("#SBATCH")]


def test_a_dry_run_shows_three_jobs_and_writes_nothing(world, tmp_path):
    path = study_file(world, tmp_path, [0, 1, 2], retries=2)
    command = [sys.executable, "-m", "ema_scale", "sweep", str(path), "--slurm", "--dry-run", "--max-parallel", "2"]
    done = subprocess.run([*command, "--gpus-per-node", "0"], env={"PATH": "/nowhere"}, capture_output=True, text=True,
                          cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "grid"
    scripts = done.stdout.split("#!/bin/bash\n")[1:]
    assert len(scripts) == 3 and not folder.exists()
    training, evaluation, report = (script.splitlines() for script in scripts)
    assert {"#SBATCH --array=0-5%2", f"#SBATCH --output={folder}/slurm/train-%A_%a.log", "RETRIES=2"} <= set(training)
    assert f"# submitted as: sbatch train.sbatch {folder}/slurm/train/%a.yaml" in training
    wait = "# submitted as: sbatch --dependency=afterany:"
    assert "WHAT=eval" in evaluation and f"{wait}<train job> eval.sbatch {folder}" in evaluation
    assert "WHAT=report" in report and "#SBATCH --time=01:00:00" in report
    assert f"{wait}<eval job> report.sbatch {folder} --out {folder}/report --title 'Study: grid'" in report
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert f"{folder}: 6 runs, 0 trained already, 6 to train" in done.stdout


def test_behind_a_gate_every_job_waits_for_its_success(world, tmp_path):
    path = study_file(world, tmp_path, [0])
    command = [sys.executable, "-m", "ema_scale", "sweep", str(path), "--slurm", "--dry-run", "--gpus-per-node", "0",
               "evaluation.gate.action=refuse"]  # fmt: skip
    done = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True, cwd=ROOT)
    folder, ok = tmp_path / "runs" / "grid", "afterok:<gate job>"
    told = [line for line in done.stdout.splitlines() if line.startswith("# submitted as: sbatch ")]
    assert [line.removeprefix("# submitted as: sbatch ") for line in told] == [
        f"gate.sbatch {folder}/slurm/train",
        f"--dependency={ok} --kill-on-invalid-dep=yes train.sbatch {folder}/slurm/train/%a.yaml",
        f"--dependency={ok},afterany:<train job> --kill-on-invalid-dep=yes eval.sbatch {folder}",
        f"--dependency={ok},afterany:<eval job> --kill-on-invalid-dep=yes report.sbatch {folder} "
        f"--out {folder}/report --title 'Study: grid'",
    ], done.stderr
    assert "WHAT=gate" in done.stdout and not folder.exists()


def test_only_what_is_missing_is_submitted(world, tmp_path):
    path = study_file(world, tmp_path, [0, 1])
    study = load_study(path)

    def jobs(*overrides):
        found = plan_sweep(study, Site(), CPU, overrides=overrides).jobs
        return [job.what for job in found], options_of(found[0]) if found else []

    second = study.runs()[1]
    train(second, RunDir(second.run_path))
    what, options = jobs()
    assert what == ["train", "eval", "report"] and "--array=0,2-3" in options
    report = run_study(study)
    assert jobs() == ([], [])
    assert jobs("evaluation.max_tokens=5")[0] == jobs("evaluation.seed=9")[0] == ["eval", "report"]
    judged = RunDir(second.run_path).eval_dir / "judgements.jsonl"
    kept = judged.read_text()
    judged.write_text(kept.splitlines()[0] + "\n")
    assert jobs()[0] == ["eval", "report"]
    judged.write_text(kept)
    report.unlink()
    assert jobs()[0] == ["report"]
    run_study(load_study(study_file(world, tmp_path, [0])))  # a smaller study: its report is another one
    assert jobs()[0] == ["report"]


def test_what_was_trained_otherwise_is_refused_before_anything_is_written(world, tmp_path):
    """By another recipe, on other data, at other rows a step: the report would show the old runs as the new ones."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((world / "train.jsonl").read_text())
    path = study_file(world, tmp_path, [0, 1], tasks={"sums": {"data": {"train": str(rows)}}})
    study = load_study(path)
    first, other, *_ = study.runs()
    train(first, RunDir(first.run_path))
    before = {p: p.read_bytes() for p in study.path.rglob("*") if p.is_file()}

    def refused(expected, *overrides, size=CPU):
        with pytest.raises(UserError, match=expected):
            plan_sweep(study, Site(), size, overrides=overrides)
        if size is CPU:
            with pytest.raises(UserError, match=expected):
                run_study(study, overrides)
        assert {p: p.read_bytes() for p in study.path.rglob("*") if p.is_file()} == before

    changed = r"study grid: 1 of its 4 runs .*\n  sums-none-s0: training.learning_rate was 0.01, is 0.5\nNothing was"
    refused(changed, "training.learning_rate=0.5")
    refused("1 of its 4 runs used .*\n  sums-none-s0: 4 rows per step, now 8\n.*--gpus-per-node", size=JobSize(gpus=2))
    plan_sweep(study, Site(), JobSize(gpus=2), overrides=("training.gradient_accumulation_steps=1",))  # 4 again
    recipe = tmp_path / "one.yaml"
    recipe.write_text(first.to_yaml().replace("learning_rate: 0.01", "learning_rate: 0.5"))
    command = [sys.executable, "-m", "ema_scale", "launch", str(recipe), "--gpus-per-node", "0", "--dry-run"]
    done = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "training.learning_rate was 0.01, is 0.5" in done.stderr, done.stderr
    text = rows.read_text()
    rows.write_text(text)  # the same content with another date
    assert plan_sweep(study, Site(), CPU).left.train == (1, 2, 3)
    rows.write_text(text.replace("answer 3", "answer 4", 1))
    refused(rf"sums-none-s0: {rows} has changed")
    with pytest.raises(UserError, match=rf"{rows} has changed.*--no-resume"):
        train(first, RunDir(first.run_path))
    train(other, RunDir(other.run_path))  # nothing was trained there yet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "2"], "--nodes: is for --slurm; on this machine --jobs says"),
        (["--slurm", "--engines", "2"], "--engines: is for this machine; with --slurm, evaluation.engines in the site"),
        (["--slurm", "--jobs", "2"], "--jobs: is for this machine; with --slurm, --max-parallel says"),
        (["--slurm", "--gpus-per-node", "0"], "no sbatch here: run this on a machine of the cluster"),
    ],
)
def test_what_does_not_go_together_is_a_message(world, tmp_path, options, message):
    command = [sys.executable, "-m", "ema_scale", "sweep", str(study_file(world, tmp_path, [0])), *options]
    done = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
