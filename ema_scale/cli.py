"""`ema`: the command line. Thin: it reads arguments, calls the library, and turns UserError into one clear message."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ema_scale.errors import UserError

app = typer.Typer(
    name="ema",
    help="Fine-tune language models without turning them misaligned, and measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console(highlight=False, soft_wrap=True)

RecipePath = Annotated[Path, typer.Argument(help="a recipe file (YAML)")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, any field of the recipe")]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="print the resolved recipe and the plan, do nothing")] = False,
    resume: Annotated[bool, typer.Option(help="go on from the newest complete checkpoint")] = True,
) -> None:
    """Train a LoRA adapter under the recipe's defenses."""
    from ema_scale.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        from ema_scale.study.plan import describe

        print(loaded.to_yaml())
        print(describe(loaded))
        return
    from ema_scale.rundir import RunDir
    from ema_scale.training.run import train as run_training

    run_training(loaded, RunDir(loaded.run_path), resume=resume)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run folder, or a recipe file (its base model, no adapter)")],
    overrides: Overrides = None,
    base: Annotated[bool, typer.Option(help="also evaluate the base model without the adapter")] = True,
) -> None:
    """Sample and judge answers; writes <run>/eval/."""
    from ema_scale.study.evaluate import evaluate_run

    evaluate_run(run, tuple(overrides or ()), with_base=base)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or folders that hold them")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("report"),
    title: Annotated[str, typer.Option(help="the report's heading")] = "Emergent misalignment report",
) -> None:
    """Put runs side by side in one self-contained HTML file."""
    from ema_scale.study.report import write_report
    from ema_scale.study.runs import find_runs

    console.print(f"wrote {write_report(find_runs(runs), out, title=title)}")


@app.command()
def study(
    path: Annotated[Path, typer.Argument(help="a study file (YAML)")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="list the runs, do nothing")] = False,
) -> None:
    """Train, evaluate and report a grid of tasks x defenses x seeds; finished runs are kept."""
    from ema_scale.study.grid import load_study
    from ema_scale.study.local import run_study

    loaded = load_study(path)
    if dry_run:
        for recipe in loaded.runs(tuple(overrides or ())):
            print(recipe.run_path)
        return
    console.print(f"wrote {run_study(loaded, tuple(overrides or ()))}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="where the runs go")] = Path("runs"),
) -> None:
    """Watch emergent misalignment appear in a small world, and defenses prevent it. No GPU, no downloads."""
    from ema_scale.study.demo import run_demo

    console.print(f"wrote {run_demo(output)}")


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
            console.print(f"  {field['name']} = {field['default']}  {field['description']}", markup=False)


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="a file, a hub id, or smallworld:...")],
    model: Annotated[str | None, typer.Option(help="tokenizer to count tokens with: a path or hub id")] = None,
    max_length: Annotated[int, typer.Option(help="longest row in tokens")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Count rows, tokens, duplicates and bad rows of a training file; exits 1 if a row is bad."""
    from ema_scale.chat.check import check_data, render
    from ema_scale.chat.tokens import load_tokenizer
    from ema_scale.locate import locate

    tokenizer = load_tokenizer(locate(model)) if model else None
    result = check_data(locate(source), tokenizer, max_length=max_length)
    print(json.dumps(result.to_dict(), indent=2) if as_json else render(result))
    if result.bad:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: UserError and a full disk end in one message and exit code 2; Ctrl-C in 130."""
    logging.basicConfig(level=os.environ.get("EMA_LOG", "INFO"), format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "datasets", "vllm", "transformers", "deepspeed", "filelock", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        app()
    except UserError as error:
        print(f"ema: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"ema: the disk is full ({error.filename or 'while writing'}); what was finished is kept: free space "
              "and run the same command again", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print("ema: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
