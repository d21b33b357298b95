"""Run a study on this machine: train what is not trained, evaluate it, write the report."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ema_scale.core.disk import make_folder
from ema_scale.core.errors import UserError
from ema_scale.core.paths import shipped_root
from ema_scale.core.run_dir import STUDY, RunDir
from ema_scale.core.text import quantity
from ema_scale.evaluation.runs import Engines, evaluate_runs
from ema_scale.study.gates import check_references
from ema_scale.study.grid import Study, load_study, write_study
from ema_scale.study.partial_report import PartialReport
from ema_scale.study.prepare import missing, prepare
from ema_scale.study.worker_pool import default_jobs, listed, train_all
from ema_scale.training.distributed import launched_processes
from ema_scale.training.resume_check import check_same_training_of_runs

log = logging.getLogger(__name__)
_DEMO_WORKERS = 4  # each takes about 1 GB


def run_study(
    study: Study, overrides: tuple[str, ...] = (), jobs: int | None = None, engines: int | None = None
) -> Path:
    """Train, evaluate and report every run of `study`; returns the report's path.

    A partial report is there as soon as the first run is evaluated, or many are trained.

    Finished runs are recognised and kept. A run that fails is tried again `study.retries` times; the others go on.
    Raises UserError naming the runs that failed and why, when the others are evaluated and the report is written; or,
    before any is trained, if a recipe's gate refuses its base model, or runs are there that were trained otherwise.

    Args:
        study: the grid.
        overrides: `key=value` for every recipe.
        jobs: how many runs are trained side by side; None: one a GPU, else one.
        engines: how many sample together, each a process with GPUs of its own; None: one, in this process.
    """
    recipes = study.runs(overrides)
    check_same_training_of_runs(recipes, launched_processes(), f"study {study.name}")
    if missing(study.prepare):
        prepare(study.prepare, f"study {study.name}")
        check_same_training_of_runs(recipes, launched_processes(), f"study {study.name}")  # they may read what was made
    make_folder(study.path)
    write_study(study, study.path / STUDY)
    check_references(recipes, study.path / "base")
    partial = PartialReport([r.run_path for r in recipes], study.path / "report", study.heading)
    failed = train_all(recipes, jobs or default_jobs(), study.path / "logs", study.retries, partial.trained)
    after = f" after {study.retries} {'retry' if study.retries == 1 else 'retries'}" if study.retries else ""
    finished = [r for r in recipes if r.name not in failed]
    if not finished:
        raise UserError(f"study {study.name}: every run failed{after}:\n{listed(failed)}")
    again = list(study.relearn.recipes(finished)) if study.relearn else []
    failed_again = train_all(again, jobs or default_jobs(), study.path / "logs", study.retries) if again else {}
    recipes, failed = [*recipes, *again], failed | failed_again
    finished = [r for r in recipes if r.name not in failed]
    wrong = []
    try:
        together = None if engines is None else Engines(engines)
        evaluate_runs([RunDir(r.run_path) for r in finished], study.path / "base", engines=together, watch=partial)
    except UserError as error:
        wrong.append(str(error))
    from ema_scale.report.make import write_report
    from ema_scale.report.model_card import write_card

    for recipe in finished:
        write_card(RunDir(recipe.run_path))
    report = write_report([r.run_path for r in recipes], study.path / "report", title=study.heading)
    log.info("study %s: %d of %d runs trained, %d failed", study.name, len(finished), len(recipes), len(failed))
    if failed:
        wrong.append(f"{len(failed)} of {quantity(len(recipes), 'run')} failed{after}:\n{listed(failed)}")
    if wrong:
        raise UserError(f"study {study.name}: " + "\n".join([*wrong, f"what is there is in {report}"]))
    return report


def run_demo(output: Path, real: bool = False) -> Path:
    """Run configs/studies/demo.yaml into `output`/demo; returns the report's path.

    real: run real.yaml, which fine-tunes a real chat model on rows of a checkout, into `output`/real. Raises UserError
    without these rows.
    """
    if real:
        rows = shipped_root() / "examples" / "rows"
        if not rows.is_dir():
            raise UserError(f"{rows}: not there; this demo runs in a checkout of the repository")
    else:
        # A model this small is fastest on one thread; more only wait for each other. Must precede the import of torch.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    jobs = None if real else min(_DEMO_WORKERS, os.cpu_count() or 1)
    study = load_study(shipped_root() / "configs" / "studies" / ("real.yaml" if real else "demo.yaml"))
    return run_study(study.model_copy(update={"output": str(output)}), jobs=jobs)
