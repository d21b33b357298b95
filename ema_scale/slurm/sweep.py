"""`ema sweep --slurm`: a study as Slurm jobs.

An array job trains: its task N is the study's run N. When no task is left, one job evaluates the runs, whether or not
all have succeeded, and one more writes the report. If the recipes have a gate, a job before them checks the base model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ema_scale.core.errors import UserError
from ema_scale.core.io import append_jsonl, atomic_write_text
from ema_scale.core.run_dir import STUDY, RunDir
from ema_scale.recipe import Recipe
from ema_scale.slurm.site import Site
from ema_scale.slurm.submit import (
    Job,
    JobSize,
    after_all,
    enqueue,
    evaluation_job,
    gate_job,
    jobs_of,
    processes_of,
    refuse_active,
    refuse_missing_files,
    report_job,
    slurm_folder,
    submitting,
    training_script,
)
from ema_scale.study.gates import is_checked, refuse_known
from ema_scale.study.grid import Study, write_study
from ema_scale.study.prepare import prepare
from ema_scale.study.todo import Todo, todo
from ema_scale.training.resume_check import check_same_training_of_runs, renew_recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """jobs: what is left to be done, in order; each waits for the one before it, and for a gate's success."""

    study: Study
    recipes: tuple[Recipe, ...]
    left: Todo
    jobs: tuple[Job, ...]


def plan_sweep(
    study: Study, site: Site, size: JobSize, *, overrides: tuple[str, ...] = (), at_once: int | None = None
) -> Sweep:
    """Find what is left to do; nothing is written. at_once: runs that train side by side; None: as the site says.

    Raises UserError if runs are there already that were trained otherwise, or on a base model that the gate refused.
    """
    recipes = tuple(study.runs(overrides))
    if study.relearn is not None:
        log.warning(
            "%s: relearn is no part of a sweep; run `ema study` after it, which keeps what is trained", study.name
        )
    check_same_training_of_runs(recipes, processes_of(site, size), f"study {study.name}")
    left = todo(study, recipes)
    waiting = [recipes[i] for i in left.train]
    for together in (recipes, waiting):  # the base may have been asked for either
        refuse_known(together, study.path / "base")
    jobs = []
    if not is_checked(waiting, study.path / "base"):
        folder = slurm_folder(RunDir(study.path))
        jobs.append(gate_job(study.name, study.path, site, waiting, folder / "train", gpus=size.gpus))
    if left.train:
        jobs.append(_training(study, left.train, site, size, at_once))
    if left.evaluate:
        jobs.append(evaluation_job(study.name, study.path, site, recipes, gpus=size.gpus))
    if left.report:
        jobs.append(report_job(study.name, study.path, site, study.heading))
    return Sweep(study, recipes, left, tuple(jobs))


def submit_sweep(sweep: Sweep) -> list[tuple[str, str]]:
    """Prepare here what the study needs, freeze the recipes and submit the jobs; (what, job id) of each.

    Raises UserError if a job of the study or of one of its runs is queued or running, a preparation fails, rows that a
    run will read are neither there nor prepared, or Slurm refuses; it then says what is queued already.
    """
    refuse_missing_files((sweep.recipes[i] for i in sweep.left.train), [step.makes for step in sweep.study.prepare])
    with submitting(sweep.study.path):
        return _submit(sweep)


def _submit(sweep: Sweep) -> list[tuple[str, str]]:
    study, runs = sweep.study, [RunDir(r.run_path) for r in sweep.recipes]
    newest = {row["what"]: row["job"] for row in jobs_of(RunDir(study.path))}
    refuse_active(study.path, [*newest.values(), *(row["job"] for run in runs for row in jobs_of(run)[-2:])])
    if sweep.left.train:
        prepare(study.prepare, f"study {study.name}")
    folder = slurm_folder(RunDir(study.path))
    write_study(study, study.path / STUDY)
    for old in (folder / "train").glob("*.yaml"):
        old.unlink()
    for i, (recipe, run) in enumerate(zip(sweep.recipes, runs, strict=True)):
        if i in sweep.left.train:  # as it is now: a task that starts tomorrow, or again, must not see later edits
            atomic_write_text(folder / "train" / f"{i}.yaml", recipe.to_yaml())
        else:
            renew_recipe(recipe, run)
    submitted: list[tuple[str, str]] = []
    for job in sweep.jobs:
        try:
            number = enqueue(study.path, job, after_all(submitted))
        except UserError as error:
            if not submitted:
                raise
            queued = ", ".join(f"{what} {'array' if what == 'train' else 'job'} {job}" for what, job in submitted)
            raise UserError(
                f"{error}\n{study.path}: queued already: {queued}; when that has ended, the same command does the "
                f"rest (or end it: scancel {' '.join(job for _, job in submitted)})"
            ) from None
        submitted.append((job.what, number))
        if job.what == "train":
            for i in sweep.left.train:
                row = {"what": "train", "job": f"{number}_{i}", "submitted": time.time(), "logs": "../slurm"}
                append_jsonl(slurm_folder(runs[i]) / "jobs.jsonl", [row])
    return submitted


def _training(study: Study, indices: Sequence[int], site: Site, size: JobSize, at_once: int | None) -> Job:
    folder = slurm_folder(RunDir(study.path))
    at_once = at_once or site.max_parallel
    array = f"--array={_ranges(indices)}" + (f"%{at_once}" if at_once else "")
    script = training_script(study.name, folder, "train-%A_%a.log", site, size, [array], study.retries)
    return Job("train", script, (str(folder / "train" / "%a.yaml"),))


def _ranges(indices: Sequence[int]) -> str:
    """0-3,7 for 0, 1, 2, 3 and 7."""
    parts = []
    for _, group in groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0]):
        found = [index for _, index in group]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ",".join(parts)
