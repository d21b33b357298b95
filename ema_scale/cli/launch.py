"""On a cluster: `ema launch`, `ema status`, `ema logs`."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_scale.cli.app import Overrides, RecipePath, app, console
from ema_scale.cli.numbers import whole
from ema_scale.core.terminal import say

if TYPE_CHECKING:
    from ema_scale.recipe import Recipe
    from ema_scale.slurm.site import Site
    from ema_scale.slurm.status import RunProgress

log = logging.getLogger(__name__)
_SGR = re.compile(r"\x1b\[[0-9;]*m")  # colours of a log


@app.command()
def launch(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[int, whole(help="number of nodes")] = 1,
    gpus_per_node: Annotated[int | None, whole(help="default: as in the site file; 0: CPU nodes", low=0)] = None,
    processes_per_node: Annotated[int | None, whole(help="default: one per GPU")] = None,
    time: Annotated[str | None, typer.Option(help="time limit in Slurm's format; default: as in the site file")] = None,
    site: Annotated[Path | None, typer.Option(help="site file (YAML); default: $EMA_SITE")] = None,
    evaluate: Annotated[bool, typer.Option(help="also submit a job that evaluates the trained run")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the scripts, submit nothing")] = False,
) -> None:
    """Train a recipe as a Slurm job.

    After a preemption or a node failure the job goes on from its newest checkpoint. Where the recipe refuses an unsafe
    base model, a job that evaluates it runs first.
    """
    from ema_scale.core.run_dir import RunDir
    from ema_scale.recipe import load_recipe
    from ema_scale.slurm import submit
    from ema_scale.slurm.site import load_site
    from ema_scale.slurm.submit import refuse_missing_files
    from ema_scale.study.gates import is_checked, refuse_known
    from ema_scale.training.resume_check import ExistingRun

    loaded, here = load_recipe(recipe, overrides or ()), load_site(site)
    size = submit.JobSize(nodes, gpus_per_node, processes_per_node, time)
    existing = ExistingRun(loaded, RunDir(loaded.run_path))
    if not (finished := existing.finished):
        existing.check_same_training(submit.processes_of(here, size))
    path, jobs = loaded.run_path, []
    if finished:
        console.print(f"{path}: trained already")
    else:
        refuse_known([loaded], path / "base")
        if not is_checked([loaded], path / "base"):
            asked = submit.recipe_file(RunDir(path))
            jobs.append(submit.gate_job(loaded.name, path, here, [loaded], asked, gpus=gpus_per_node))
        jobs.append(submit.training_job(loaded, here, size))
    if evaluate:
        jobs.append(submit.evaluation_job(loaded.name, path, here, [loaded], gpus=gpus_per_node))
        warn_of_missing_key([loaded], here)
    if dry_run:
        for before, job in zip([None, *jobs], jobs, strict=False):
            say(submit.describe_script(job, submit.after_success(f"<{before.what} job>") if before else []))
        return
    if not finished:
        refuse_missing_files([loaded])
    waits: list[str] = []
    for job in jobs:
        number = submit.submit(loaded, job, waits)
        waits = submit.after_success(number)
        console.print(f"{path}: {job.what} job {number}")
    console.print(f"follow it: ema logs {path} -f")


def warn_of_missing_key(recipes: Sequence[Recipe], site: Site) -> None:
    """Warn if the judge's API key is not set here. It may be set on the nodes, so this is no error."""
    from ema_scale.evaluation.judges.assignment import missing_judge_key_on_node

    name = missing_judge_key_on_node([recipe.evaluation for recipe in recipes], site.environment)
    if name is not None:
        log.warning(
            "evaluation.judge: %s is set neither here nor in the site file's environment: without it on the node, the "
            "evaluation fails before it samples",
            name,
        )


@app.command()
def status(
    runs: Annotated[list[Path] | None, typer.Argument(help="runs, studies, or folders of them; default: runs/")] = None,
) -> None:
    """Show the state of runs: step, time left, Slurm jobs.

    Of a study: the number of runs per state, and those that are running or failed.
    """
    from ema_scale.slurm.status import launched_runs, statuses, study_status

    alone: list[Path] = []
    for path in [found for folder in runs or [Path("runs")] for found in launched_runs(folder)]:
        of_study = study_status(path)
        if of_study is None:
            alone.append(path)
            continue
        console.print("  ".join([str(path), of_study.counts, *of_study.jobs]))
        shown = ("running", "failed", "stopped", "interrupted")
        _print_runs([run for run in of_study.runs if run.state in shown], "  ")
    _print_runs(statuses(alone))


def _print_runs(runs: Sequence[RunProgress], indent: str = "") -> None:
    from ema_scale.core.text import format_clock

    for found in runs:
        step = f"step {found.step}" + (f"/{found.max_steps}" if found.max_steps else "") if found.step else ""
        left = f"{format_clock(found.left)} left" if found.left is not None else ""
        parts = [str(found.path), found.state, step, left, *found.jobs]
        console.print(indent + "  ".join(part for part in parts if part))
        if found.state in ("failed", "stopped") and found.reason:
            console.print(f"{indent}    {found.reason}")


@app.command()
def logs(
    run: Annotated[Path, typer.Argument(help="a run's or a study's folder")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="follow, job after job, until the last one ends or one fails")
    ] = False,
    lines: Annotated[int, whole("--lines", "-n", help="lines of each log to start with")] = 100,
    what: Annotated[
        str | None, typer.Option("--job", help="gate, train, eval or report; default: the newest one that has started")
    ] = None,
) -> None:
    """Print the log of a launched run's newest job.

    It is the newest that has started or failed. On top: why training failed.
    """
    from ema_scale.core.run_dir import RunDir
    from ema_scale.slurm import logs as cluster_logs

    for line in cluster_logs.lines(RunDir(run), follow=follow, tail=lines, what=what):
        say(_SGR.sub("", line), flush=follow)
