"""`ema logs`: what a run's jobs say: why the training failed first, then a job's own log, then what its processes say.

`ema launch` and `ema sweep` queue chains of jobs, each of which waits for the one before it, so that the newest one
says nothing for most of the time: shown is the one that the chain has come to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.slurm import client
from ema_scale.slurm.submit import KINDS, jobs_of, log_of, ranks_log_of
from ema_scale.study.find import find_study

log = logging.getLogger(__name__)
_Job = dict[str, Any]


def lines(run: RunDir, *, follow: bool = False, tail: int = 100, what: str | None = None) -> Iterator[str]:
    """tail: how many lines of each log to begin with. follow: go on until the job has ended and, unless `what` names
    it, with those of the chain after it, until one fails.

    Raises UserError if no such job was submitted for this run, or there are many, as for a study's training.
    """
    every = jobs_of(run)
    jobs = [job for job in every if what in (None, job["what"])]
    if not jobs:
        raise UserError(f"{run.path}: no {what or ''} job was submitted for this run; `ema launch` does that")
    chain, at = jobs[-1:], 0
    if what is None:
        chain = _chain(jobs)
        at = _come_to(run, chain)
    in_study = find_study(run.path) is not None
    if in_study and chain[at]["what"] == "train" and not (follow and what is None):
        raise UserError(f"{run.path}: its runs are trained by an array; one task's log: ema logs {run.path}/RUN")
    training = next((job for job in reversed(every) if job["what"] == "train"), None)
    told = _failure(run, training)
    yield from told
    for job in chain[at:]:
        if job is not chain[at]:
            yield f"--- {job['what']} job {job['job']}"
        if in_study and job["what"] == "train":
            yield f"an array trains the runs; one task's log: ema logs {run.path}/RUN"
        yield from _said(run, job, follow, tail)
        if not follow:
            return
        # Behind a study's array everything goes on, whatever became of it.
        if not (in_study and job["what"] != "gate") and (
            _has_failed(job, _asked([job])) or (job is training and _failure(run, job))
        ):
            break
    if job["what"] != "train" and not told:  # it failed while another job was looked at
        yield from _failure(run, training)


def _chain(jobs: Sequence[_Job]) -> list[_Job]:
    """Those that were submitted last, one after the other: of every kind at most one, in the order that they run in."""
    found = [jobs[-1]]
    for job in reversed(jobs[:-1]):
        if KINDS.index(job["what"]) >= KINDS.index(found[0]["what"]):
            break
        found.insert(0, job)
    return found


def _come_to(run: RunDir, chain: Sequence[_Job]) -> int:
    """The newest that has started, but if one failed, those behind it were dropped: then that one, started or not."""
    started = max((i for i, job in enumerate(chain) if _has_started(run, job)), default=-1)
    if started + 1 == len(chain):
        return started
    first = max(started, 0)
    states = _asked(chain[first:])
    return next((i for i in range(first, len(chain)) if _has_failed(chain[i], states)), first)


def _has_started(run: RunDir, job: _Job) -> bool:
    log = log_of(run, job)
    return log.exists() or any(log.parent.glob(f"{log.stem}_*.log"))  # an array's tasks


def _has_failed(job: _Job, states: Mapping[str, client.JobState]) -> bool:
    state = states.get(job["job"])
    return state is not None and not state.active and state.state not in ("COMPLETED", client.UNKNOWN)


def _asked(jobs: Sequence[_Job]) -> Mapping[str, client.JobState]:
    try:
        return client.job_states([job["job"] for job in jobs])
    except UserError:  # logs can be read where there is no Slurm
        return {}


def _failure(run: RunDir, training: _Job | None) -> list[str]:
    status = run.status()
    if training is None or status.state != "failed" or status.updated <= training.get("submitted", 0):
        return []  # or an earlier job's
    return [f"FAILED: {status.reason or ''}"]


def _said(run: RunDir, job: _Job, follow: bool, tail: int) -> Iterator[str]:
    files = [_Tail(log_of(run, job), tail), _Tail(ranks_log_of(run, job), tail)]
    asked = 0.0
    while True:
        ended = False
        if follow and time.monotonic() - asked > 5:  # before reading: what was said until then is not missed
            asked = time.monotonic()
            ended = not client.job_states([job["job"]])[job["job"]].active
        for file in files:
            yield from file.read()
        if not follow or ended:
            break
        time.sleep(0.5)
    if not _has_started(run, job):
        state = _asked([job]).get(job["job"])
        known = f": {state.state}" if state and state.state != client.UNKNOWN else ""
        yield f"job {job['job']} has not started{known}"


class _Tail:
    """The last lines of a file that grows; each `read` gives the whole lines that are new."""

    def __init__(self, path: Path, tail: int) -> None:
        self.path, self.tail = path, tail
        self._at: int | None = None

    def read(self) -> list[str]:
        try:
            with open(self.path, "rb") as handle:
                handle.seek(self._at or 0)
                data = handle.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        first = self._at is None
        self._at = (self._at or 0) + len(whole)
        # Without control characters: a log may hold a model's words, and those may hold a terminal's commands.
        text = "".join(c for c in whole.decode(errors="replace") if c.isprintable() or c in "\n\t")
        found = text.splitlines()
        return found[-self.tail :] if first else found
