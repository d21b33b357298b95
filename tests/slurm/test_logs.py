"""Which job of a chain `ema logs` shows, and how it goes on; Slurm's commands are stand-ins here."""

import subprocess
import sys

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.io import append_jsonl, atomic_write_text
from ema_scale.core.run_dir import RunDir
from ema_scale.slurm.logs import lines
from ema_scale.slurm.submit import jobs_of, log_of
from ema_scale.study.grid import Study, write_study
from tests.slurm.test_submit import commands

__all__ = ["commands"]


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run").create()


def submitted(run, *kinds):
    for what in kinds:
        job = str(7 + len(jobs_of(run)))
        append_jsonl(run.path / "slurm" / "jobs.jsonl", [{"what": what, "job": job, "submitted": 1.0}])
    return jobs_of(run)


def begins(run, *jobs):
    for job in jobs:
        atomic_write_text(log_of(run, job), f"{job['what']} speaks\n")


@pytest.fixture
def slurm(commands):
    """says({job: (state, reason)}, ...): what squeue answers, at the first question, the second, and from then on."""

    def says(folder, *answers):
        for i, states in enumerate(answers, 1):
            text = "".join(f"{job}|{state}|{reason}|\n" for job, (state, reason) in states.items())
            atomic_write_text(folder / f"answer-{min(i, len(answers))}", text)
        (folder / "asked").write_text("")
        count = f"echo >>{folder}/asked; n=$(wc -l <{folder}/asked); [ $n -gt {len(answers)} ] && n={len(answers)}"
        # Only what was asked for, as squeue does.
        only = 'jobs="$(echo "$*" | grep -o "jobs=[0-9,_]*" | cut -d= -f2 | tr , "|")"'
        commands("squeue", f'{count}; {only}; grep -E "^($jobs)(_|[|])" {folder}/answer-$n; true')

    return says


WAITS, RUNS, DONE = ("PENDING", "Dependency"), ("RUNNING", ""), ("COMPLETED", "")
FAILED, DROPPED = ("FAILED", "NonZeroExitCode"), ("CANCELLED", "DependencyNeverSatisfied")


def test_while_the_training_runs_it_is_shown_and_not_the_evaluation_that_waits(run, slurm, tmp_path):
    training, _ = submitted(run, "train", "eval")
    begins(run, training)
    slurm(tmp_path, {"7": RUNS, "8": WAITS})
    assert list(lines(run)) == ["train speaks"]
    assert list(lines(run, what="eval")) == ["job 8 has not started: PENDING"]


def test_following_it_goes_from_the_gate_to_the_evaluation(run, slurm, tmp_path):
    chain = submitted(run, "gate", "train", "eval")
    begins(run, chain[0])
    slurm(tmp_path, {"7": DONE, "8": DONE, "9": DONE})
    told = []
    for line in lines(run, follow=True):
        told.append(line)
        if line.startswith("--- "):  # it has begun by now
            begins(run, next(job for job in chain if f"--- {job['what']} job {job['job']}" == line))
    assert told == ["gate speaks", "--- train job 8", "train speaks", "--- eval job 9", "eval speaks"]
    assert list(lines(run, follow=True)) == ["eval speaks"]
    assert list(lines(run, follow=True, what="gate")) == ["gate speaks"]


def test_a_training_that_fails_is_what_is_shown_whatever_waited_for_it(run, slurm, tmp_path):
    training, _ = submitted(run, "train", "eval")
    begins(run, training)
    slurm(tmp_path, {"7": FAILED, "8": DROPPED})
    run.set_status("failed", reason="rank 1: why")
    assert list(lines(run)) == list(lines(run, follow=True)) == ["FAILED: rank 1: why", "train speaks"]
    assert list(lines(run, what="eval")) == ["FAILED: rank 1: why", "job 8 has not started: CANCELLED"]
    # It is launched again: what failed was an earlier job.
    append_jsonl(run.path / "slurm" / "jobs.jsonl", [{"what": "train", "job": "9", "submitted": 1e12}])
    slurm(tmp_path, {"7": FAILED, "8": DROPPED, "9": WAITS})
    assert list(lines(run)) == ["job 9 has not started: PENDING"]


def test_one_that_fails_while_the_evaluation_is_followed_is_said_at_the_end(run, slurm, tmp_path):
    submitted(run, "train", "eval")
    slurm(tmp_path, {"8": DROPPED})
    follower = lines(run, follow=True, what="eval")
    assert next(follower) == "job 8 has not started: CANCELLED"
    run.set_status("failed", reason="rank 1: why")
    assert list(follower) == ["FAILED: rank 1: why"]


def test_a_job_that_was_cancelled_before_it_started_is_shown(run, slurm, tmp_path):
    gate, _, _ = submitted(run, "gate", "train", "eval")
    begins(run, gate)
    slurm(tmp_path, {"7": DONE, "8": ("CANCELLED", ""), "9": DROPPED})
    assert list(lines(run)) == ["job 8 has not started: CANCELLED"]


def test_where_slurm_has_forgotten_a_job_the_run_says_how_it_went(run, slurm, tmp_path):
    training, evaluation = submitted(run, "train", "eval")
    begins(run, training)
    slurm(tmp_path, {})
    run.set_status("failed", reason="why")
    assert list(lines(run, follow=True)) == ["FAILED: why", "train speaks"]
    run.set_status("finished")
    assert list(lines(run, follow=True)) == ["train speaks", "--- eval job 8", "job 8 has not started"]
    begins(run, evaluation)
    assert list(lines(run, follow=True)) == ["eval speaks"]


def test_a_study_goes_on_behind_its_array_whatever_became_of_that(slurm, tmp_path):
    study = Study(name="s", recipe="r.yaml", output=str(tmp_path), tasks={"a": {}}, defenses={"none": []})
    write_study(study, study.path / "study.yaml")
    folder = RunDir(study.path)
    _, evaluation, report = submitted(folder, "train", "eval", "report")
    atomic_write_text(folder.path / "slurm" / "train-7_0.log", "a task speaks\n")
    slurm(tmp_path, {"7_0": FAILED, "8": FAILED, "9": DONE})
    with pytest.raises(UserError, match="trained by an array; one task's log: ema logs .*/s/RUN"):
        list(lines(folder))
    told = []
    for line in lines(folder, follow=True):
        told.append(line)
        if line.startswith("--- "):
            begins(folder, evaluation if "eval" in line else report)
    one = f"an array trains the runs; one task's log: ema logs {folder.path}/RUN"
    assert told == [one, "--- eval job 8", "eval speaks", "--- report job 9", "report speaks"]


def test_looking_at_a_cluster_does_not_wait_for_imports_that_take_seconds():
    code = (
        "import sys, ema_scale.cli, ema_scale.slurm.logs, ema_scale.slurm.status, ema_scale.slurm.submit\n"
        "print([name for name in ('torch', 'transformers', 'scipy', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
