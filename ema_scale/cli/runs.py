"""One run, start to finish: `ema train`, `ema eval`, `ema report`."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_scale.cli.app import Overrides, RecipePath, app, console
from ema_scale.cli.numbers import whole
from ema_scale.cli.results import RESULT_FILES, evaluations
from ema_scale.core.errors import UserError
from ema_scale.core.records import DataReport
from ema_scale.core.run_dir import RunDir
from ema_scale.core.terminal import say
from ema_scale.core.text import format_clock, quantity

if TYPE_CHECKING:
    from ema_scale.evaluation.records import Summary

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

        say(loaded.to_yaml())
        say(describe_run(loaded))
        if missing := loaded.missing_files():
            raise UserError(f"{recipe}: " + "; ".join(f"{key}: {name}: not found" for key, name in missing))
        return
    from ema_scale.evaluation.gate import refuses
    from ema_scale.training.distributed import is_main
    from ema_scale.training.run import train as run_training

    if refuses(loaded):
        from ema_scale.study.gates import is_checked, refuse_known

        refuse_known([loaded], loaded.run_path / "base")
        if is_main() and not is_checked([loaded], loaded.run_path / "base"):
            log.warning("evaluation.gate: the base model has not been checked yet; run `ema gate` before training")
    run = run_training(loaded, RunDir(loaded.run_path), resume=resume)
    if is_main():
        from ema_scale.report.model_card import write_card

        write_card(run)
        console.print(describe_trained(run))


def describe_trained(run: RunDir) -> str:
    """What a finished training learned, where its adapter is, and what comes next."""
    from ema_scale.data.report import report_lines

    status, report = run.status(), DataReport.read(run.data_path)
    took = f" in {format_clock(status.seconds)}" if status.seconds else ""
    lines = [f"trained  {quantity(status.step or 0, 'step')}{took}"]
    if status.stopped_early:
        lines[0] += f", stopped early: {status.stopped_early}"
    lines += [f"learned  {line}" for line in (report_lines(report)[:2] if report else ())]
    return "\n".join([*lines, f"adapter  {run.adapter}", f"next     ema eval {shlex.quote(str(run.path))}"])


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run, a study's folder, or a recipe file (its base model)")],
    overrides: Overrides = None,
    base: Annotated[bool, typer.Option(help="also evaluate the base model without the adapter")] = True,
    legacy: Annotated[bool, typer.Option("--legacy", help="count as the paper's released evaluator does")] = False,
    dry_run: Annotated[bool, typer.Option(help="say what would be asked and judged, and what is there")] = False,
    engines: Annotated[int | None, whole(help="engines that sample together, each with GPUs of its own")] = None,
    assisted: Annotated[
        bool, typer.Option("--assisted", help="start one of them here; the others run `--assist-until` elsewhere")
    ] = False,
    assist_until: Annotated[
        Path | None, typer.Option(help="only lend an engine to another process that evaluates, until this file exists")
    ] = None,
) -> None:
    """Sample and judge answers, and show the rates.

    Everything is kept in <run>/eval/.
    """
    from ema_scale.study.evaluate import evaluate_run, planned_evaluation

    if assist_until is not None:
        from ema_scale.evaluation.runs import assist

        assist(run, assist_until)
        return
    if assisted and engines is None:
        raise UserError("--assisted: found no --engines; expected how many engines there are in all")

    settings = [*(overrides or ()), *(["evaluation.legacy=true"] if legacy else [])]
    if dry_run:
        from ema_scale.evaluation.dry_run import describe_plan

        for group in planned_evaluation(run, tuple(settings), base):
            console.print(describe_plan(group.targets, group.model, group.settings, group.place))
        return
    summaries = evaluate_run(run, tuple(settings), with_base=base, engines=engines, assisted=assisted)
    if run.is_dir():
        from ema_scale.report.model_card import write_card
        from ema_scale.study.find import find_runs

        for folder in find_runs([run]):
            write_card(RunDir(folder))
    console.print(describe_evaluated(summaries, run, tuple(settings)))


def describe_evaluated(summaries: Mapping[str, Summary], path: Path, overrides: tuple[str, ...] = ()) -> str:
    """The rates, what they took, where the rest is, and what comes next.

    Args:
        summaries: by target.
        path: a run, a folder of runs, or a recipe.
        overrides: of the recipe.
    """
    from ema_scale.evaluation.table import rates_table, work_done
    from ema_scale.recipe import load_recipe

    took = work_done(summaries)
    took[-1] += f", in {format_clock(max(s.seconds for s in summaries.values()))}"
    where = path if path.is_dir() else load_recipe(path, overrides).run_path
    return "\n".join(
        (
            rates_table(summaries),
            *took,
            f"answers  {where}",
            f"next     ema report {shlex.quote(str(where))}",
        )
    )


@app.command()
def gate(
    path: Annotated[Path, typer.Argument(help="a recipe or a study file (YAML), or a folder of a study's recipes")],
    overrides: Overrides = None,
) -> None:
    """Check that base models are safe enough as references.

    Fails where a recipe says `evaluation.gate.action: refuse`.
    """
    from ema_scale.study.gates import ask_references

    for folder, summary in ask_references(path, tuple(overrides or ())).items():
        if summary.gate is not None:
            console.print(f"{folder}: {summary.gate.text}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, folders that hold them, or result files")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("report"),
    title: Annotated[str, typer.Option(help="the report's heading")] = "Emergent misalignment report",
) -> None:
    """Put runs side by side in one self-contained HTML file."""
    from ema_scale.report.make import write_report
    from ema_scale.study.find import find_runs

    published = [folder for path in runs if path.suffix in RESULT_FILES for folder in evaluations(path)]
    others = [path for path in runs if path.suffix not in RESULT_FILES]
    console.print(f"wrote {write_report((find_runs(others) if others else []) + published, out, title=title)}")


@app.command()
def defenses(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List the defenses with source, what they need and parameters."""
    from ema_scale.defenses.registry import catalogue

    entries = catalogue()
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    for entry in entries:
        console.print(f"{entry['kind']}: {entry['summary']}\n  source: {entry['source']}")
        console.print(f"  needs: {', '.join(entry['needs']) or 'nothing'}")
        if entry["uses"]:
            console.print(f"  can use: {', '.join(entry['uses'])}")
        for field in entry["parameters"]:
            console.print(f"  {field['name']} = {field['default']}  ({field['type']})  {field['description']}")
