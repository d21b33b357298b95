"""From recipes to jobs in Slurm's queue, written down in the folder of the run or study that they work on."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_scale.core.devices import engine_gpus
from ema_scale.core.errors import UserError
from ema_scale.core.io import append_jsonl, atomic_write_text, file_lock, read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.planning.describe import maker
from ema_scale.recipe import Recipe
from ema_scale.slurm import client
from ema_scale.slurm.site import Site, fill_script, sbatch_options, settings
from ema_scale.study.find import find_study

_SHOWN = 10


def refuse_missing_files(recipes: Iterable[Recipe], made: Iterable[str] = ()) -> None:
    """Raises UserError that lists each missing file with its run and key.

    made: files that a preparation writes later; these may be missing.
    """
    coming = list(made)
    wrong = [
        f"{recipe.run_path}: {key}: {name}: no such file or folder"
        for recipe in recipes
        for key, name in recipe.missing_files()
        if maker(name, coming) is None
    ]
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise UserError("\n".join([*wrong[:_SHOWN], *more]))


def evaluation_gpus(recipes: Sequence[Recipe], site: Site) -> int:
    """GPUs of the largest engine of `recipes`, but at least the site's number; 0 on nodes without GPUs.

    Raises UserError, naming run and field, if an evaluation node has fewer, or the engine's sizes are no numbers.
    """
    node = site.evaluation_node()
    most, where = 1, ""
    for recipe in recipes:
        for field, engine in _engines(recipe):
            taken = engine_gpus(engine, f"{recipe.name}: {field}")
            if taken > most:
                most, where = taken, f"{recipe.name}: {field}"
    if 0 < node < most:
        raise UserError(
            f"{where}: found tensor_parallel_size x pipeline_parallel_size = {most} GPUs, and an evaluation node has "
            f"{node}; ask for fewer, or set evaluation.gpus_per_node in the site file"
        )
    return min(node, max(most if where else 0, site.evaluation.gpus))


def _engines(recipe: Recipe) -> list[tuple[str, Mapping[str, Any]]]:
    # The judge's engine is loaded when the sampler's is gone: the larger of them counts, not the sum.
    asked = recipe.evaluation
    sampler = [("evaluation.engine", asked.engine)] if asked.sampler in ("auto", "vllm") else []
    judge = [("evaluation.judge.engine", asked.judge.engine)] if asked.judge.kind == "vllm" else []
    return [*sampler, *judge]


# Seconds to wait while another command submits jobs for the same run or study.
_PATIENCE = 120.0
KINDS = ("gate", "train", "eval", "report")  # of jobs, in the order in which they wait for each other


@dataclass(frozen=True)
class Job:
    """One script with its arguments, ready to be submitted.

    Args:
        what: of KINDS.
        script: the text of the batch script.
        arguments: of the script.
        first_task: the script is an array, and the state of its task 0 counts as that of the job.
    """

    what: str
    script: str
    arguments: tuple[str, ...]
    first_task: bool = False


def slurm_folder(run: RunDir) -> Path:
    """Scripts, logs and job ids of a run."""
    return run.path / "slurm"


def recipe_file(run: RunDir) -> Path:
    """The recipe that a run's jobs read."""
    return slurm_folder(run) / "train.yaml"


def jobs_of(run: RunDir) -> list[dict[str, Any]]:
    """Every job submitted for this run, oldest first: what, job, submitted (seconds), logs if they lie elsewhere."""
    return read_jsonl(slurm_folder(run) / "jobs.jsonl")


def log_of(run: RunDir, job: dict[str, Any]) -> Path:
    """A job's own log."""
    return _log(run, job, "log")


def ranks_log_of(run: RunDir, job: dict[str, Any]) -> Path:
    """What the processes of a job say."""
    return _log(run, job, "ranks.log")


def _log(run: RunDir, job: dict[str, Any], ending: str) -> Path:
    # An array's logs lie together: Slurm wants one pattern for all of its tasks.
    folder = os.path.normpath(run.path / job.get("logs", "slurm"))
    return Path(folder) / f"{job['what']}-{job['job']}.{ending}"


@dataclass(frozen=True)
class JobSize:
    """What one training takes. gpus, processes: per node; None: the site's GPUs, and one process per GPU."""

    nodes: int = 1
    gpus: int | None = None
    processes: int | None = None
    time: str | None = None


def processes_of(site: Site, size: JobSize) -> int:
    """Processes of one training on all of its nodes."""
    gpus = site.gpus_per_node if size.gpus is None else size.gpus
    return size.nodes * (size.processes or max(gpus, 1))


def training_job(recipe: Recipe, site: Site, size: JobSize) -> Job:
    """A job that trains one recipe."""
    folder = slurm_folder(RunDir(recipe.run_path))
    script = training_script(recipe.name, folder, "train-%j.log", site, size)
    return Job("train", script, (str(recipe_file(RunDir(recipe.run_path))),))


def training_script(
    name: str, folder: Path, log: str, site: Site, size: JobSize, more: Sequence[str] = (), retries: int = 0
) -> str:
    """launch/slurm/train.sbatch with its logs in `folder`; `more`: further sbatch options."""
    gpus = site.gpus_per_node if size.gpus is None else size.gpus
    processes = processes_of(site, size) // size.nodes
    site = site.for_training(size.gpus)
    options = sbatch_options(site, name, folder / log, nodes=size.nodes, gpus=gpus, processes=processes, time=size.time)
    values = {"PROCESSES_PER_NODE": processes, "RETRIES": retries}
    return fill_script("train.sbatch", [*options, *more], settings(site, sys.executable, folder, values))


def evaluation_job(
    name: str, path: Path, site: Site, recipes: Sequence[Recipe] = (), *, gpus: int | None = None
) -> Job:
    """`ema eval` of a run's or a study's folder, with the GPUs that its recipes' engines need.

    It is a job on one node, or, if the site has several engines for it, an array of as many tasks.

    gpus: GPUs per node that training takes (None: all). Raises UserError, naming a run, if a node has too few.
    """
    return _asking("eval", name, path, site, recipes, gpus, path)


def gate_job(name: str, path: Path, site: Site, recipes: Sequence[Recipe], asked: Path, *, gpus: int | None) -> Job:
    """`ema gate` of `asked`, a recipe file or a folder of them; otherwise as `evaluation_job`.

    A training that waits for its success never trains on a base model that its recipe refuses.
    """
    return _asking("gate", name, path, site, recipes, gpus, asked)


def _asking(
    what: str, name: str, path: Path, site: Site, recipes: Sequence[Recipe], gpus: int | None, argument: Path
) -> Job:
    site = site.where_training_takes(gpus)
    taken = evaluation_gpus(recipes, site)
    engines = site.evaluation.engines if what == "eval" else 1
    script = _script(what, name, path, site.for_evaluation(taken), taken, engines)
    return Job(what, script, (str(argument),), first_task=engines > 1)


def report_job(name: str, path: Path, site: Site, title: str) -> Job:
    """`ema report` of a study's folder, into report/ in there."""
    arguments = (str(path), "--out", str(path / "report"), "--title", title)
    return Job("report", _script("report", name, path, site.for_report(), site.report.gpus), arguments)


def _script(what: str, name: str, path: Path, site: Site, gpus: int, engines: int = 1) -> str:
    folder = slurm_folder(RunDir(path))
    log = f"{what}-%A_%a.log" if engines > 1 else f"{what}-%j.log"
    options = sbatch_options(site, f"{name}-{what}", folder / log, gpus=gpus)
    array = [f"--array=0-{engines - 1}"] if engines > 1 else []
    values = {"WHAT": what, "ENGINES": engines}
    return fill_script("eval.sbatch", [*options, *array], settings(site, sys.executable, folder, values))


def after_success(job: str) -> list[str]:
    """sbatch options: wait until this job has succeeded. If it fails, Slurm drops the waiting job."""
    return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def after_all(jobs: Sequence[tuple[str, str]]) -> list[str]:
    """sbatch options of the next job in a chain: it waits for the end of the last job, and for the success of a gate.

    jobs: (what, job id) of the jobs before it.
    """
    if not jobs:
        return []
    gates, (what, last) = [job for kind, job in jobs if kind == "gate"], jobs[-1]
    if not gates:
        return after_end(last)
    dependency, invalid = after_success(gates[0])
    return [dependency if what == "gate" else f"{dependency},afterany:{last}", invalid]


def after_end(job: str) -> list[str]:
    """sbatch options: wait until this job, or every task of this array, has ended, failed or not."""
    return [f"--dependency=afterany:{job}"]


def submit(recipe: Recipe, job: Job, options: Sequence[str] = ()) -> str:
    """Write script and recipe into the run folder and submit; the job's id. options: further ones of sbatch.

    Raises UserError if a job of the same kind is already queued or running for this run, or Slurm refuses.
    """
    run = RunDir(recipe.run_path)
    with submitting(run.path):
        alike = {job.what, "train"} if job.what == "gate" else {job.what}
        refuse_active(run.path, [row["job"] for row in jobs_of(run) if row["what"] in alike][-3:])
        if job.what in ("gate", "train"):  # as it is now: a job that starts tomorrow must not see later edits
            atomic_write_text(recipe_file(run), recipe.to_yaml())
        return enqueue(run.path, job, options)


@contextlib.contextmanager
def submitting(path: Path) -> Iterator[None]:
    """Hold the submission lock of this run, or of its study: from the check for active jobs until sbatch.

    Raises UserError if another command still holds it after two minutes.
    """
    held = path.parent if find_study(path.parent) else path
    busy = UserError(f"{held}: another command is submitting jobs for it; try again")
    with file_lock(slurm_folder(RunDir(held)) / ".lock", busy, _PATIENCE):
        yield


def enqueue(path: Path, job: Job, options: Sequence[str] = ()) -> str:
    """Submit a job of the run or study in `path` and write it down there; the job's or array's id.

    Raises UserError with Slurm's own words if it refuses.
    """
    folder = slurm_folder(RunDir(path))
    script = folder / f"{job.what}.sbatch"
    atomic_write_text(script, job.script, private=True)  # its environment may hold keys
    number = client.submit(script, job.arguments, options)
    noted = f"{number}_0" if job.first_task else number
    append_jsonl(folder / "jobs.jsonl", [{"what": job.what, "job": noted, "submitted": time.time()}])
    return number


def refuse_active(path: Path, jobs: Iterable[str]) -> None:
    """Raises UserError if one of these jobs is still queued or running."""
    for state in client.job_states(jobs).values():
        if state.active:
            raise UserError(
                f"{path}: job {state.job} ({state.state}) is on it already; "
                f"wait for it, or end it with: scancel {state.job}"
            )


def describe_script(job: Job, options: Sequence[str] = ()) -> str:
    """The script, and below it the command that would submit it."""
    return f"{job.script}# submitted as: sbatch {' '.join([*options, job.what])}.sbatch {shlex.join(job.arguments)}\n"
