"""Judging apart from sampling: `ema judge`, `ema judge check`, `ema export`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ema_scale.cli.app import app, console
from ema_scale.cli.results import RESULT_FILES, evaluations
from ema_scale.core.errors import UserError
from ema_scale.core.text import printable

if TYPE_CHECKING:
    from ema_scale.evaluation.stats.paired import Compared

JudgeOverrides = Annotated[list[str] | None, typer.Argument(help="evaluation.judge.key=value")]


class AnswersFirst(TyperGroup):
    """`ema judge FOLDER` is `ema judge again FOLDER`; a folder that is called check is ./check."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["again", *args]
        return super().parse_args(ctx, args)


judge = typer.Typer(
    cls=AnswersFirst,
    no_args_is_help=True,
    help="Judge stored answers again, and check the judge.\n\n`ema judge FOLDER`, `ema judge check`.",
)


app.add_typer(judge, name="judge")


@judge.command()
def again(
    answers: Annotated[Path, typer.Argument(help="a run, a study, an evaluation folder, or a result file")],
    overrides: JudgeOverrides = None,
) -> None:
    """Judge stored answers again, by another judge, prompt or threshold; the model is not loaded."""
    from ema_scale.evaluation.judging.rejudge import eval_folders, rejudge
    from ema_scale.evaluation.table import rates_table

    folders = evaluations(answers) if answers.suffix in RESULT_FILES else eval_folders(answers)
    summaries = {str(f): rejudge(f, tuple(overrides or ())) for f in folders}
    console.print(rates_table(summaries))
    judges = dict.fromkeys(s.judge for s in summaries.values())
    console.print(f"judged by {'; '.join(judges)}")


@judge.command()
def check(
    path: Annotated[Path, typer.Argument(help="a run, a study, an evaluation folder, or a recipe file")],
    overrides: JudgeOverrides = None,
) -> None:
    """Measure the judge's agreement with labelled answers, with itself, and with other judges of the same answers."""
    from ema_scale.evaluation.judging.rejudge import check_judges, describe_agreement, describe_alpha, describe_check

    found = check_judges(path, tuple(overrides or ()))
    for identity, figures in found.judges.items():
        console.print("\n".join(describe_check(identity, figures)))
    for one in found.between or ():
        console.print("\n".join(describe_agreement(one)))
    if found.together is not None and len(found.together.judges) > 2:
        console.print("\n".join(describe_alpha(found.together)))


@app.command()
def export(
    answers: Annotated[Path, typer.Argument(help="a run, a study or an evaluation folder")],
    kind: Annotated[
        str, typer.Option("--format", "-f", help="csv (the field's columns), parquet, inspect or inspect-scores")
    ] = "csv",
    judge: Annotated[str | None, typer.Option(help="identity of another judge; default: the evaluation's own")] = None,
    spreadsheet: Annotated[bool, typer.Option(help="CSV in which no cell is a formula")] = False,
) -> None:
    """Write answers with judgements as CSV, Parquet or Inspect log.

    The file is <folder>/answers.csv, .parquet, or .eval for `inspect view`. inspect-scores writes the judgements alone,
    for Inspect's precomputed_scores.
    """
    from ema_scale.evaluation.formats.tables import export as write
    from ema_scale.evaluation.judging.rejudge import eval_folders

    for folder in eval_folders(answers):
        console.print(f"wrote {write(folder, kind, judge=judge, spreadsheet=spreadsheet)}")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="evaluated run folders or result files; the first is the baseline if none is named"),
    ],
    baseline: Annotated[Path | None, typer.Option(help="the run folder (or base/) to compare with")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Compare evaluated runs question by question.

    Gives difference, 95 % interval and p. Samples nothing, judges nothing.
    """
    from ema_scale.evaluation.stats.arms import read_arm
    from ema_scale.evaluation.stats.difference import METHOD
    from ema_scale.evaluation.stats.paired import check_comparable, compare_all

    given = [baseline, *runs] if baseline is not None else runs
    paths = [folder for path in given for folder in evaluations(path)]
    if len(paths) < 2:
        raise UserError("compare: found one run, expected at least two, or one and --baseline")
    start, *arms = [read_arm(path) for path in paths]
    for arm in arms:
        check_comparable(arm, start)
    found = dict(zip((str(arm.path) for arm in arms), compare_all(arms, start), strict=True))
    if as_json:
        entries = {name: [asdict(one) for one in each] for name, each in found.items()}
        print(json.dumps({"baseline": str(start.path), "method": METHOD, "runs": entries}, indent=1))
        return
    for arm in arms:
        _print(arm.name, start.name, found[str(arm.path)])
    console.print(METHOD)
    if any(one.questions == "unseen" for each in found.values() for one in each):
        console.print("Unseen questions: no training row of any of these runs asks them.")
    if unknown := [arm.name for arm in (start, *arms) if arm.seen is None]:
        console.print(f"Which questions the training rows of {', '.join(unknown)} ask is not known.")


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 else "<0.001"


def _print(name: str, baseline: str, found: list[Compared]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{name} against {baseline}, percent of answers; margins and losses in nats per token"
    if all(one.unit == "share" for one in found):
        title = f"{name} against {baseline}, percent of answers"
    table = Table(title=Text(printable(title)), title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "baseline", "run", "difference in points", "p", "Holm", "questions"):
        table.add_column(Text(heading), justify="right" if heading else "left", no_wrap=True)
    apart = any(one.questions != "all" for one in found)
    for one in found:
        d = one.difference
        scale, digits = (100, 1) if one.unit == "share" else (1, 3)
        limits = "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*(scale * v for v in (d.value, d.low, d.high)), n=digits)
        name = one.measure if one.questions == "all" and not apart else f"{one.measure}, {one.questions}"
        cells = (name, *(f"{scale * (r.value or 0):.{digits}f}" for r in (one.baseline, one.arm)), limits)
        style = "bold" if d.corrected_p < 0.05 else ""
        shown = map(Text, map(printable, cells))
        table.add_row(*shown, Text(_p(d.p)), Text(_p(d.corrected_p), style=style), Text(str(d.questions)))
    # On a narrower terminal the cells would be cut.
    width = Console(width=1000).measure(table).maximum
    Console(width=max(console.width, width), highlight=False, soft_wrap=True).print(table)
    if found and found[0].power:
        console.print(Text(f"{found[0].measure}: {found[0].power}\n"))
