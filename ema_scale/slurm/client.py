"""Slurm's own commands, asked from Python: submit a script, and how jobs are doing."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.waiting import waiting

log = logging.getLogger(__name__)
# Slurm's names for jobs that will run on, or run again. A preempted job that is still in the queue is about to be
# requeued; sacct's word for one that has left it is an end.
ACTIVE = frozenset(
    (
        "PENDING CONFIGURING RUNNING COMPLETING PREEMPTED REQUEUED REQUEUE_HOLD REQUEUE_FED RESIZING SIGNALING "
        "STAGE_OUT STOPPED SUSPENDED"
    ).split()
)
UNKNOWN = "UNKNOWN"
_ENDED_PREEMPTED = "PREEMPTED, not requeued"
# Slurm's commands take options from these, before those of a script. A job around this one sets the first for itself.
_OF_SLURM = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_", "SQUEUE_", "SACCT_")
_WHERE_SLURM_IS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
_FORGOTTEN = "Invalid job id"


@dataclass(frozen=True)
class JobState:
    """A job as Slurm sees it. state: Slurm's word, or UNKNOWN once Slurm has forgotten the job."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def submit(script: Path, arguments: Sequence[str] = (), options: Sequence[str] = ()) -> str:
    """`sbatch [options] script [arguments]`; the job's id. Raises UserError with Slurm's own words."""
    if ignored := sorted(name for name in os.environ if name.startswith("SBATCH_")):
        log.info("%s: ignored; name such options in the site file", ", ".join(ignored))
    done = _ask(["sbatch", "--parsable", *options, str(script), *arguments])
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().split(";")[0]


def job_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """The state of each job id, from squeue, and for what it has forgotten from sacct where there is accounting.

    Array tasks are asked for as "12_3"; an array as a whole, "12", is where one of its tasks is that has not ended.
    Raises UserError if there is no Slurm here, or it does not answer: no answer is not "no job".
    """
    asked = list(dict.fromkeys(jobs))
    found: dict[str, JobState] = {}
    if not asked:
        return found
    # One unknown id among several is no error to squeue; a single one is.
    listed = _ask(
        ["squeue", "--noheader", "--states=all", "--array", f"--jobs={','.join(asked)}", "--format=%i|%T|%r|%N"]
    )
    if listed.returncode and _FORGOTTEN not in listed.stderr:
        said = listed.stderr.strip() or f"exit code {listed.returncode}"
        raise UserError(f"squeue does not say how jobs {', '.join(asked)} are doing: {said}")
    for line in listed.stdout.splitlines():
        parts = line.split("|")
        if len(parts) == 4:
            found[parts[0]] = JobState(*parts)
            array = parts[0].partition("_")[0]
            if array != parts[0] and (array not in found or not found[array].active):
                found[array] = JobState(array, *parts[1:])
    lost = [job for job in asked if job not in found]
    if lost and shutil.which("sacct"):
        kept = _ask(["sacct", "-X", "-n", "-P", f"--jobs={','.join(lost)}", "--format=JobID,State"])
        for line in kept.stdout.splitlines():
            job, _, state = line.partition("|")
            if state:
                word = re.split(r"[ +]", state)[0]
                found[job] = JobState(job, _ENDED_PREEMPTED if word == "PREEMPTED" else word)
    return {job: found.get(job, JobState(job, UNKNOWN)) for job in asked}


def _environment() -> dict[str, str]:
    """This process's, without an outer job's settings and options; the submitted job inherits it."""
    return {k: v for k, v in os.environ.items() if k in _WHERE_SLURM_IS or not k.startswith(_OF_SLURM)}


def _ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        with waiting(f"Slurm's answer to {command[0]}"):
            return subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())
    except FileNotFoundError:
        raise UserError(
            f"no {command[0]} here: run this on a machine of the cluster, where Slurm's commands are"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within two minutes; try again") from None
