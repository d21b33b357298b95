"""Which failure is the cause, and how runs are described; no Slurm needed."""

import json
import sys
import time

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.io import append_jsonl, atomic_write_text
from ema_scale.core.run_dir import FolderInUse, RunDir
from ema_scale.core.text import format_clock
from ema_scale.slurm import failure, finished
from ema_scale.slurm.finished import has_finished
from ema_scale.slurm.logs import lines
from ema_scale.slurm.status import launched_runs, statuses, study_status
from ema_scale.slurm.submit import log_of, ranks_log_of
from ema_scale.study.grid import Study, write_study
from tests.slurm.test_submit import commands

__all__ = ["commands"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    made = RunDir(tmp_path / "run").create()
    made.set_status("failed", reason="DistBackendError: connection closed by peer", processes=4, max_steps=9)
    return made


def fail(monkeypatch, run, rank, error):
    monkeypatch.setenv("RANK", str(rank))
    try:
        raise error
    except Exception as raised:
        failure.write(run, raised)


def test_the_cause_comes_before_its_echoes(run, monkeypatch):
    from torch.distributed import DistNetworkError

    fail(monkeypatch, run, 0, RuntimeError("[/gloo/transport/tcp/pair.cc] Connection closed by peer"))
    fail(monkeypatch, run, 3, DistNetworkError("lost"))
    fail(monkeypatch, run, 2, ValueError("the real one"))
    fail(monkeypatch, run, 1, UserError("a later one"))
    told = failure.explain(run)
    assert told.startswith("FAILED: rank 2 on ") and told.splitlines()[0].endswith("ValueError: the real one")
    assert "(3 more processes failed after it)" in told and "Traceback" in told
    status = run.status()
    assert status.state == "failed" and "the real one" in status.reason and status.max_steps == 9
    assert (run.path / "slurm" / "failures" / "7.2" / "rank-2.json").exists()
    failure.record(run, 2, "killed by SIGABRT", "", late=False)  # what the process itself said stays
    assert "the real one" in failure.explain(run)


@pytest.mark.parametrize(
    ("error", "node"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "node4"),
        (OSError(5, "Input/output error"), "node4"),
        (ValueError("lr is wrong"), None),
        (RuntimeError("NCCL timeout"), None),
    ],
)
def test_a_node_is_bad_if_the_first_failure_is_its_own(run, monkeypatch, error, node):
    monkeypatch.setenv("SLURMD_NODENAME", "node4")
    fail(monkeypatch, run, 0, error)
    assert failure.bad_node(run) == node
    if node:
        assert "rank 0 on node4: " in failure.explain(run), "Slurm's name for it, which may not be its host name"


def test_a_rank_that_said_nothing_is_named(run, monkeypatch):
    for rank in (0, 1, 3):
        fail(monkeypatch, run, rank, RuntimeError("NCCL timeout"))
    assert "rank 2 of 4 said nothing: stopped, killed or cut off" in failure.explain(run)


def test_a_finished_run_stays_finished(run):
    run.set_status("finished", step=9)
    assert "without a word" in failure.explain(run) and run.status().state == "finished"


def test_a_run_that_another_job_is_on_is_left_alone(run, monkeypatch):
    run.set_status("running", step=3)
    with run.lock():  # as a process of that job holds it
        assert "without a word" in failure.explain(run) and run.status().state == "running"
        with pytest.raises(FolderInUse) as refused, RunDir(run.path).lock():
            pass
    fail(monkeypatch, run, 0, refused.value)
    fail(monkeypatch, run, 1, RuntimeError("Connection closed by peer"))
    told = failure.explain(run)  # that job waits between two attempts by now: the lock is free
    assert "another process is writing to this run folder" in told.splitlines()[0]
    assert run.status().state == "running"


def test_a_failure_is_written_down_even_if_torch_cannot_be_loaded(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    fail(monkeypatch, run, 0, ImportError("libcudart.so.12: cannot open shared object file"))
    assert "libcudart.so.12" in failure.explain(run)


def test_only_a_finished_run_counts_as_finished(run):
    assert not has_finished(run)
    run.set_status("stopped")
    assert not has_finished(run)
    run.set_status("running")
    assert not has_finished(run, patience=0.6)
    run.set_status("finished")
    assert has_finished(run)


@pytest.mark.parametrize(("level", "said"), [("INFO", r"\x1b[31mno.yaml"), ("loud", "EMA_LOG: found 'loud', expected")])
def test_a_job_s_own_commands_end_in_one_message_that_steers_no_terminal(level, said, monkeypatch, capsys):
    monkeypatch.setenv("EMA_LOG", level)
    with pytest.raises(SystemExit) as stop:
        finished.main(["/nowhere/\x1b[31mno.yaml"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("ema: ") and said in err and "\x1b" not in err


def test_a_run_that_never_got_as_far_as_a_status_has_failed(run):
    run.status_path.unlink()
    failure.explain(run)
    assert run.status().state == "failed" and "without a word" in run.status().reason


def test_what_a_run_says_without_slurm(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    now = time.time()
    append_jsonl(run.metrics_path, [{"step": s, "loss": 1.0, "time": now - 20 + 10 * s} for s in (1, 2)])
    assert not (run.path / "slurm").exists()
    with pytest.raises(UserError, match="no run here"):
        launched_runs(run.path)
    job = {"what": "train", "job": "7", "submitted": now}
    append_jsonl(run.path / "slurm" / "jobs.jsonl", [job])
    run.set_status("running", max_steps=9)
    (found,) = statuses(launched_runs(run.path.parent))
    assert (found.state, found.step, found.max_steps, found.jobs) == ("running", 2, 9, ("train 7",))
    assert found.left == pytest.approx(70, abs=5) and format_clock(3725) == "1:02:05"

    assert list(lines(run)) == ["job 7 has not started"]
    atomic_write_text(log_of(run, job), "a\nb\nc\nhalf a li")
    atomic_write_text(ranks_log_of(run, job), "0: \x1b[31mred\n")
    run.set_status("failed", reason="rank 1: why")
    assert list(lines(run, tail=2)) == ["FAILED: rank 1: why", "b", "c", "0: [31mred"]
    append_jsonl(run.path / "slurm" / "jobs.jsonl", [{**job, "job": "8", "submitted": time.time()}])
    assert list(lines(run)) == ["job 8 has not started"]  # and has not failed, as the one before it
    with pytest.raises(UserError, match="no eval job"):
        list(lines(run, what="eval"))


@pytest.mark.parametrize(
    ("squeue", "state"),
    [
        ("echo Invalid job id >&2; exit 1", "running"),  # forgotten: it goes on without Slurm
        ("echo '7|FAILED|NonZeroExitCode|'", "interrupted"),
        ("echo '7|RUNNING||node1'", "running"),
        ("echo '7|PENDING|BeginTime|'", "waiting"),
    ],
)
def test_a_run_is_interrupted_if_slurm_says_that_its_job_has_ended(run, commands, squeue, state):
    commands("squeue", squeue)
    append_jsonl(run.path / "slurm" / "jobs.jsonl", [{"what": "train", "job": "7", "submitted": time.time()}])
    run.set_status("running", max_steps=9)
    assert statuses([run.path])[0].state == state


def test_what_a_study_says_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    study = Study(
        name="s", recipe="r.yaml", output=str(tmp_path), tasks={"a": {}}, defenses={"none": []}, seeds=[0, 1, 2]
    )
    write_study(study, study.path / "study.yaml")
    RunDir(study.path / "a-none-s0").set_status("finished", step=2)
    RunDir(study.path / "a-none-s2").set_status("failed", reason="why")
    atomic_write_text(study.path / "a-none-s0" / "eval" / "summary.json", "{}")
    append_jsonl(study.path / "slurm" / "jobs.jsonl", [{"what": "train", "job": "8"}, {"what": "report", "job": "9"}])
    assert launched_runs(tmp_path) == launched_runs(study.path) == [study.path]
    found = study_status(study.path)
    assert found.counts == "3 runs: 1 finished, 1 not started, 1 failed; 1 evaluated"
    assert found.jobs == ("train 8", "report 9") and found.runs[2].reason == "why"
    row = {"what": "train", "job": "8_1", "logs": "../slurm"}
    assert log_of(RunDir(study.path / "a-none-s1"), row) == study.path / "slurm" / "train-8_1.log"
    with pytest.raises(UserError, match="trained by an array; one task's log: ema logs .*/s/RUN"):
        list(lines(RunDir(study.path), what="train"))
    assert study_status(tmp_path) is None


def test_a_task_of_an_array_keeps_its_failures_under_its_own_name(run, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert failure.folder(run).name == "7_3.2"


def test_files_of_failures_hold_everything(run, monkeypatch):
    fail(monkeypatch, run, 5, KeyError("x"))
    found = json.loads((failure.folder(run) / "rank-5.json").read_text())
    assert found["rank"] == 5 and found["error"] == "KeyError: 'x'" and not found["late"] and found["host"]
