"""A study on this machine or on a cluster: `ema sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.app import Overrides, app, console
from ema_scale.cli.launch import warn_of_missing_key
from ema_scale.cli.studies import DryRun, Jobs, StudyPath, print_preparation, study


@app.command()
def sweep(
    path: StudyPath,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="as Slurm jobs; default: on this machine")] = False,
    site: Annotated[Path | None, typer.Option(help="site file (YAML); default: $EMA_SITE")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="machines of one run; default: 1")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="default: the site's; 0: CPU nodes")] = None,
    processes_per_node: Annotated[int | None, typer.Option(min=1, help="default: one a GPU")] = None,
    time: Annotated[str | None, typer.Option(help="time limit of one run; default: the site's")] = None,
    max_parallel: Annotated[int | None, typer.Option(min=1, help="runs that train at once; default: no limit")] = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
) -> None:
    """Train, evaluate and report a study, as `ema study`; with --slurm: an array of trainings, then an evaluation, then
    the report. Finished runs are kept, and failed ones retried as the study says."""
    from ema_scale.errors import UserError

    only_slurm = {
        "site": site, "nodes": nodes, "gpus-per-node": gpus_per_node, "processes-per-node": processes_per_node,
        "time": time, "max-parallel": max_parallel,
    }  # fmt: skip
    if not slurm:
        given = [name for name, value in only_slurm.items() if value is not None]
        if given:
            raise UserError(f"--{given[0]}: is for --slurm; on this machine --jobs says how many runs train at once")
        study(path, overrides, dry_run, jobs)
        return
    if jobs is not None:
        raise UserError("--jobs: is for this machine; with --slurm, --max-parallel says how many runs train at once")
    from ema_scale.cluster.site import load_site
    from ema_scale.cluster.submit import Size, after_all, shown
    from ema_scale.cluster.sweep import plan_sweep, submit_sweep
    from ema_scale.study.grid import load_study

    size = Size(nodes or 1, gpus_per_node, processes_per_node, time)
    here = load_site(site)
    plan = plan_sweep(load_study(path), here, size, overrides=tuple(overrides or ()), at_once=max_parallel)
    if any(job.what == "eval" for job in plan.jobs):
        warn_of_missing_key(plan.recipes, here)
    folder, total, left = plan.study.path, len(plan.recipes), len(plan.left.train)
    if dry_run:
        if left:
            print_preparation(plan.study)
        chain = [(job.what, f"<{job.what} job>") for job in plan.jobs]
        for number, job in enumerate(plan.jobs):
            print(shown(job, after_all(chain[:number])))
    if not plan.jobs:
        console.print(f"{folder}: all {total} runs are trained, evaluated and reported; nothing to do")
    else:
        console.print(f"{folder}: {total} runs, {total - left} trained already, {left} to train")
    if dry_run or not plan.jobs:
        return
    for what, submitted in submit_sweep(plan):
        console.print(f"{folder}: {what} {'array' if what == 'train' else 'job'} {submitted}")
    console.print(f"follow it: ema status {folder}")
