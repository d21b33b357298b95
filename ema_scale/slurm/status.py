"""`ema status`: how runs and studies are doing, from their folders and from Slurm's queue."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.core.text import quantity
from ema_scale.slurm import client
from ema_scale.slurm.submit import jobs_of
from ema_scale.study.find import find_runs, find_study

_RECENT = 20  # rows that the speed is read from
_HELD = client.ACTIVE - {"RUNNING", "COMPLETING"}


@dataclass(frozen=True)
class RunProgress:
    """How one run is doing. left: seconds until training ends at its recent speed; None unless it runs."""

    path: Path
    state: str
    reason: str
    step: int
    max_steps: int | None
    left: float | None
    jobs: tuple[str, ...]
    evaluated: bool


@dataclass(frozen=True)
class StudyStatus:
    """A study: its runs, in order, and what Slurm says of the jobs for all of them."""

    path: Path
    runs: tuple[RunProgress, ...]
    jobs: tuple[str, ...]

    @property
    def counts(self) -> str:
        """12 runs: 10 finished, 1 failed, 1 running; 8 evaluated"""
        states = ", ".join(f"{n} {state}" for state, n in Counter(run.state for run in self.runs).most_common())
        evaluated = sum(run.evaluated for run in self.runs)
        return f"{quantity(len(self.runs), 'run')}: {states}" + (f"; {evaluated} evaluated" if evaluated else "")


def study_status(path: Path) -> StudyStatus | None:
    """How a study's runs and jobs are doing; None if `path` is no study's folder. Works without Slurm."""
    study = find_study(path)
    if study is None:
        return None
    jobs = _newest(RunDir(path))
    submitted = {run: _newest(RunDir(run)) for run in (path / name for name in study.names())}
    tasks = [job for of_run in submitted.values() for _, job in of_run]
    known = _known([job for _, job in jobs] + tasks)
    words = []
    for what, job in jobs:
        # Of an array, Slurm knows its tasks.
        states = Counter(known[t].state for t in tasks if t.startswith(f"{job}_") and t in known)
        told = ", ".join(f"{n} {state}" for state, n in states.most_common() if state != client.UNKNOWN)
        words.append(f"{what} {job}" + (f" ({told})" if told else "") if what == "train" else _words(what, job, known))
    return StudyStatus(path, tuple(_status(run, of_run, known) for run, of_run in submitted.items()), tuple(words))


def statuses(runs: Sequence[Path]) -> list[RunProgress]:
    """One entry per run, in order. Works without Slurm: jobs then have no state."""
    submitted = {path: _newest(RunDir(path)) for path in runs}
    known = _known([job for jobs in submitted.values() for _, job in jobs])
    return [_status(path, submitted[path], known) for path in runs]


def launched_runs(folder: Path) -> list[Path]:
    """`folder`, if it is a run or a study, else those directly below it that were launched, or else all runs.

    Raises UserError if there is none.
    """
    if (folder / "slurm" / "jobs.jsonl").exists() or find_study(folder):
        return [folder]
    return sorted(path.parents[1] for path in folder.glob("*/slurm/jobs.jsonl")) or find_runs([folder])


def _newest(run: RunDir) -> list[tuple[str, str]]:
    """(what, job id), the newest of each kind."""
    return list({row["what"]: row["job"] for row in jobs_of(run)}.items())


def _known(jobs: Sequence[str]) -> dict[str, client.JobState]:
    try:
        return client.job_states(jobs)
    except UserError:
        return {}


def _words(what: str, job: str, known: dict[str, client.JobState]) -> str:
    found = known.get(job)
    place = f" on {found.nodes}" if found and found.nodes else ""
    reason = f" ({found.reason})" if found and found.state == "PENDING" else ""
    return f"{what} {job} {found.state if found else ''}{reason}{place}".rstrip()


def _status(path: Path, jobs: Sequence[tuple[str, str]], known: dict[str, client.JobState]) -> RunProgress:
    run = RunDir(path)
    status = run.status()
    rows = read_jsonl(run.metrics_path)
    step = status.step or (int(rows[-1]["step"]) if rows else 0)
    most = status.max_steps
    state: str = status.state
    reason = status.reason or ""
    training = known.get(dict(jobs).get("train", ""))
    if training and state != "finished":
        if training.state in _HELD:  # for the first time, or to go on
            state = "waiting"
        elif training.state == "RUNNING" and state != "running":
            state = "starting"
        elif training.active or training.state == client.UNKNOWN:
            pass  # the run's own word: of a job that Slurm has forgotten it may have been gone on without Slurm
        elif state == "running":
            state = "interrupted"
        elif state == "not started":
            state, reason = "failed", f"job {training.job} ended before it began: ema logs {path}"
    left = None
    recent = rows[-_RECENT:]
    if state == "running" and most and len(recent) > 1 and recent[-1]["step"] > recent[0]["step"]:
        pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
        left = max(0.0, pace * (most - step) - (time.time() - recent[-1]["time"]))
    words = tuple(_words(what, job, known) for what, job in jobs)
    return RunProgress(path, state, reason, step, most, left, words, (run.eval_dir / "summary.json").exists())
