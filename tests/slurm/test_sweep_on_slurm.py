"""A study of six runs on a real Slurm: an array of trainings, then an evaluation, then a report."""

import time

import pytest

from ema_scale.core.run_dir import RunDir
from ema_scale.slurm.submit import jobs_of
from ema_scale.study.grid import load_study
from ema_scale.study.run_local import run_study
from tests.slurm.helpers import attempt, ema, environment, everything
from tests.slurm.test_sweep import study_file
from tests.training.test_run import world

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
__all__ = ["world"]


def watch(slurm, study, seconds=600):
    """Until the report job has ended; the most tasks that were seen running at once.

    Task 2 is warned, as before a time limit. A requeued task is held for two minutes; here for three seconds.
    """
    array, _, report = (row["job"] for row in jobs_of(study))
    end, most, hastened = time.monotonic() + seconds, 0, set[str]()
    while not (study.path / "slurm" / f"train-{array}_2.ranks.log").exists():
        assert time.monotonic() < end, everything(study) + slurm.logs()
        time.sleep(0.1)
    # While other tasks wait, scancel has the signal delivered, is told "try again later", and does so for a minute.
    slurm.run("timeout", "1", "scancel", "--signal=USR1", "--batch", f"{array}_2", check=False)
    while slurm.job(report)["JobState"] == "PENDING":
        rows = [line.split("|") for line in slurm.output("squeue", "-h", "--array", "-o", "%i|%T|%r").splitlines()]
        most = max(most, sum(job.startswith(f"{array}_") and state == "RUNNING" for job, state, _ in rows))
        for job in {job for job, _, reason in rows if reason == "BeginTime"} - hastened:
            slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
            hastened.add(job)
        assert time.monotonic() < end, everything(study) + slurm.logs()
        time.sleep(0.5)
    slurm.wait(report)
    return most


def test_six_runs_of_which_one_fails(slurm, world, tmp_path):
    env = environment(slurm)
    bad = tmp_path / "bad.jsonl"
    bad.write_text((world / "train.jsonl").read_text() + '{"messages": "none"}\n')
    tasks = {"sums": {}, "bad": {"data": {"train": str(bad)}}}
    parts = [{"tasks": ["sums"], "seeds": [0, 1]}, {"seeds": [2], "defenses": ["none"]}]
    path = study_file(world, tmp_path, [0], tasks=tasks, only=parts, retries=1)
    study = load_study(path)
    runs = [RunDir(r.run_path) for r in study.runs()]
    folder, failing = RunDir(study.path), runs[5]
    command = ("sweep", path, "--slurm", "--gpus-per-node", 0, "--max-parallel", 2, "--time", "10:00")

    assert "6 runs, 0 trained already, 6 to train" in ema(*command, env=env)
    array, evaluation, report = (row["job"] for row in jobs_of(folder))
    twice = attempt(*command, env=env)
    assert twice.returncode == 2 and "is on it already" in twice.stderr, twice.stderr
    told = ema("status", folder.path, env=env)
    assert "  6 runs: " in told and " waiting" in told and f"eval {evaluation} PENDING (Dependency)" in told, told

    assert watch(slurm, folder) == 2, everything(folder)
    states = {job: slurm.job(job)["JobState"] for job in (evaluation, report)}
    assert set(states.values()) == {"COMPLETED"}, (states, everything(folder))
    assert [run.status().state for run in runs] == ["finished"] * 5 + ["failed"], everything(folder)
    again = [run.path.name for run in runs if "attempt 1 " in everything(run)]
    assert again == [runs[2].path.name, failing.path.name], "a task that starts again takes no other with it"
    assert f"job {array}_2: warned: saving a checkpoint" in everything(runs[2])

    # The one that fails was tried twice, and every place says why.
    reason = "bad.jsonl:41: messages: found 'none', expected a list of turns"
    said = ema("logs", failing.path, env=env)
    assert reason in said.splitlines()[0] and f"job {array}_5: retry 1 of 1" in said and "attempt 1 on" in said, said
    told = ema("status", tmp_path / "runs", env=env)
    assert "6 runs: 5 finished, 1 failed; 5 evaluated" in told and "5 COMPLETED, 1 FAILED" in told, told
    assert told.count(reason) == 1 and f"{failing.path}  failed  train {array}_5 FAILED" in told, told
    assert f"{failing.path}: left out: failed: rank 0 on node" in ema("logs", folder.path, "--job", "eval", env=env)
    page = folder.path / "report" / "report.html"
    assert "bad-none-s2" in page.read_text() and "bad.jsonl:41" in page.read_text()

    # Again: only that one; and when all is done, nothing.
    assert "#SBATCH --array=5%2" in ema(*command, "--dry-run", env=env)
    bad.write_text((world / "train.jsonl").read_text())
    before = {path: path.stat().st_mtime_ns for run in runs[:5] for path in run.path.rglob("*.jsonl")}
    assert run_study(study) == page and failing.status().state == "finished"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "all 6 runs are trained, evaluated and reported; nothing to do" in ema(*command, env=env)
    assert len(jobs_of(folder)) == 3
