"""Many runs: `ema study`, `ema demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_scale.cli.app import Overrides, app, console

if TYPE_CHECKING:
    from ema_scale.study.grid import Study

StudyPath = Annotated[Path, typer.Argument(help="a study file (YAML)")]
DryRun = Annotated[bool, typer.Option(help="show what would be done, do nothing")]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="runs trained side by side; default: one a GPU")]


@app.command()
def study(path: StudyPath, overrides: Overrides = None, dry_run: DryRun = False, jobs: Jobs = None) -> None:
    """Train, evaluate and report a grid of models x tasks x defenses x seeds; finished runs are kept."""
    from ema_scale.study.grid import load_study
    from ema_scale.study.local import run_study

    loaded = load_study(path)
    if dry_run:
        print_preparation(loaded)
        for recipe in loaded.runs(tuple(overrides or ())):
            print(recipe.run_path)
        return
    console.print(f"wrote {run_study(loaded, tuple(overrides or ()), jobs)}")


def print_preparation(study: Study) -> None:
    """What a dry run says of a study's `prepare`."""
    from ema_scale.study.prepare import missing

    for step in missing(study.prepare):
        print(f"# first, for {step.makes}: {step}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="where the runs go")] = Path("runs"),
) -> None:
    """Watch emergent misalignment appear in a small world, and defenses prevent it. No GPU, no downloads."""
    from ema_scale.study.demo import run_demo

    console.print(f"wrote {run_demo(output)}")
