"""One run, start to finish: `ema train`, `ema eval`, `ema report`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.app import Overrides, RecipePath, app, console

log = logging.getLogger(__name__)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="print the resolved recipe and the plan, do nothing")] = False,
    resume: Annotated[bool, typer.Option(help="continue from the newest complete checkpoint")] = True,
) -> None:
    """Train a LoRA adapter under the recipe's defenses."""
    from ema_scale.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        from ema_scale.planning.describe import describe_run

        print(loaded.to_yaml())
        print(describe_run(loaded))
        return
    from ema_scale.core.run_dir import RunDir
    from ema_scale.evaluation.gate import refuses
    from ema_scale.training.distributed import is_main
    from ema_scale.training.run import train as run_training

    if refuses(loaded):
        from ema_scale.study.gates import is_checked, refuse_known

        refuse_known([loaded], loaded.run_path / "base")
        if is_main() and not is_checked([loaded], loaded.run_path / "base"):
            log.warning("evaluation.gate: the base model has not been checked yet; run `ema gate` before training")
    run_training(loaded, RunDir(loaded.run_path), resume=resume)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run, a study's folder, or a recipe file (its base model)")],
    overrides: Overrides = None,
    base: Annotated[bool, typer.Option(help="also evaluate the base model without the adapter")] = True,
    legacy: Annotated[bool, typer.Option("--legacy", help="count as the paper's released evaluator does")] = False,
) -> None:
    """Sample and judge answers; writes <run>/eval/."""
    from ema_scale.study.evaluate import evaluate_run

    asked = [*(overrides or ()), *(["evaluation.legacy=true"] if legacy else [])]
    evaluate_run(run, tuple(asked), with_base=base)


@app.command()
def gate(
    path: Annotated[Path, typer.Argument(help="a recipe or a study file (YAML), or a folder of a study's recipes")],
    overrides: Overrides = None,
) -> None:
    """Check, before training, that the base models are safe enough as references.

    Fails where a recipe says `evaluation.gate.action: refuse`.
    """
    from ema_scale.study.gates import ask_references

    for folder, summary in ask_references(path, tuple(overrides or ())).items():
        if summary.gate is not None:
            console.print(f"{folder}: {summary.gate.text}", markup=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or folders that hold them")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("report"),
    title: Annotated[str, typer.Option(help="the report's heading")] = "Emergent misalignment report",
) -> None:
    """Put runs side by side in one self-contained HTML file."""
    from ema_scale.report.make import write_report
    from ema_scale.study.find import find_runs

    console.print(f"wrote {write_report(find_runs(runs), out, title=title)}")


@app.command()
def cache(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Compute the reference's hidden states on a recipe's rows once, for all runs that train on them."""
    from ema_scale.recipe import load_recipe
    from ema_scale.training.distributed import is_main
    from ema_scale.training.run import fill_cache

    done = fill_cache(load_recipe(recipe, overrides or ()))
    if is_main():
        console.print(f"{done.rows} rows computed, {done.tokens} tokens, {done.seconds:.1f} s: {done.folder}")


@app.command()
def defenses(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List the defenses with source and parameters."""
    from ema_scale.defenses.registry import catalogue

    entries = catalogue()
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    for entry in entries:
        console.print(f"{entry['kind']}: {entry['summary']}\n  source: {entry['source']}", markup=False)
        for field in entry["parameters"]:
            console.print(
                f"  {field['name']} = {field['default']}  ({field['type']})  {field['description']}", markup=False
            )
