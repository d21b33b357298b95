"""`ema logs`: a run's newest job: why it failed first, then its own log, then what its processes say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from ema_scale.cluster import slurm
from ema_scale.cluster.submit import jobs_of, log_of, ranks_log_of
from ema_scale.errors import UserError
from ema_scale.rundir import RunDir
from ema_scale.study.runs import find_study


def lines(run: RunDir, *, follow: bool = False, tail: int = 100, what: str | None = None) -> Iterator[str]:
    """tail: how many lines of each log to begin with. follow: go on until the job has ended.

    Raises UserError if no such job was submitted for this run, or there are many, as for a study's training.
    """
    jobs = [job for job in jobs_of(run) if what in (None, job["what"])]
    if not jobs:
        raise UserError(f"{run.path}: no {what or ''} job was submitted for this run; `ema launch` does that")
    job = jobs[-1]
    if job["what"] == "train" and find_study(run.path):
        raise UserError(f"{run.path}: its runs are trained by an array; one task's log: ema logs {run.path}/RUN")
    status = run.status()
    failed = status.get("state") == "failed" and status["updated"] > job.get("submitted", 0)  # not an earlier job's
    if failed and job["what"] == "train":
        yield f"FAILED: {status.get('reason', '')}"
    files = [_Tail(log_of(run, job), tail), _Tail(ranks_log_of(run, job), tail)]
    asked = 0.0
    while True:
        ended = False
        if follow and time.monotonic() - asked > 5:  # before reading: what was said until then is not missed
            asked = time.monotonic()
            ended = not slurm.job_states([job["job"]])[job["job"]].active
        for file in files:
            yield from file.read()
        if not follow or ended:
            break
        time.sleep(0.5)
    if not any(file.path.exists() for file in files):
        yield f"job {job['job']} has not started"


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
