"""`ema look`: answers to read, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_scale.cli.app import app
from ema_scale.cli.numbers import whole
from ema_scale.cli.results import RESULT_FILES, evaluations
from ema_scale.core.text import printable, quantity

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ema_scale.evaluation.look import AskedQuestion, ReadAnswer

_COLOURS = {"misaligned": "red", "incoherent": "yellow", "incorrect": "red", "aligned": "green", "correct": "green"}
NARROWEST = 36  # columns of the terminal for each arm, if arms stand side by side


@app.command()
def look(
    paths: Annotated[list[Path], typer.Argument(help="runs, studies, evaluation folders, or result files")],
    suite: Annotated[str | None, typer.Option(help="only suites with this in their name")] = None,
    verdict: Annotated[
        str | None, typer.Option(help="aligned, misaligned, incoherent, correct, incorrect or unjudged")
    ] = None,
    question: Annotated[str | None, typer.Option(help="only questions with this in their id or text")] = None,
    arm: Annotated[str | None, typer.Option(help="only arms with this in their name")] = None,
    judge: Annotated[str | None, typer.Option(help="another judge's verdicts: a part of its identity")] = None,
    answers: Annotated[int, whole("--answers", "-n", help="answers per question and arm")] = 2,
    questions: Annotated[int, whole(help="questions to show")] = 10,
    length: Annotated[int, whole(help="characters per answer")] = 800,
    reasoning: Annotated[bool, typer.Option(help="also show what was thought before the answer")] = False,
) -> None:
    """Read answers side by side, with their verdicts."""
    from rich.console import Console

    from ema_scale.evaluation.judging.rejudge import eval_folders
    from ema_scale.evaluation.look import read_answers, select

    folders = [
        folder for path in paths for folder in (evaluations if path.suffix in RESULT_FILES else eval_folders)(path)
    ]
    found = select(read_answers(folders, judge), suite=suite, verdict=verdict, question=question, arm=arm)
    console = Console(highlight=False)
    for one in found[:questions]:
        _show(console, one, answers, length, reasoning)
    hidden = len(found) - questions
    console.print(
        f"{len(found[:questions])} of {quantity(len(found), 'question')}{f' (--questions {len(found)})' * (hidden > 0)}"
    )


def _show(console: Console, asked: AskedQuestion, count: int, length: int, reasoning: bool) -> None:
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    console.print(Rule(Text(printable(f"{asked.suite}/{asked.question_id}")), align="left"))
    if asked.system is not None:
        console.print(Text(f"System: {printable(asked.system)}", style="dim"))
    console.print(Text(printable(asked.asked), style="bold"))
    columns = {arm: [_answer(a, length, reasoning) for a in those[:count]] for arm, those in asked.answers.items()}
    if len(columns) > 1 and console.width >= NARROWEST * len(columns):
        table = Table(expand=True, show_lines=True)
        for arm, those in asked.answers.items():
            table.add_column(Text(_heading(arm, those, count)), ratio=1)
        for i in range(max(map(len, columns.values()))):
            table.add_row(*(cells[i] if i < len(cells) else Text("") for cells in columns.values()))
        console.print(table)
        return
    for arm, those in asked.answers.items():
        console.print(Text(_heading(arm, those, count), style="underline"))
        for cell in columns[arm]:
            console.print(cell)
            console.print()


def _heading(arm: str, those: list[ReadAnswer], count: int) -> str:
    return printable(f"{arm}: {min(count, len(those))} of {quantity(len(those), 'answer')}")


def _answer(answer: ReadAnswer, length: int, reasoning: bool) -> RenderableType:
    from rich.text import Text

    scores = f" ({answer.scores})" if answer.scores else ""
    text = Text(printable(f"{answer.verdict}{scores}"), style=_COLOURS.get(answer.verdict, "dim"))
    if reasoning and answer.sample.reasoning:
        text.append(f"\n{printable(answer.sample.reasoning[:length])}", style="dim")
    said = answer.sample.answer
    text.append(f"\n{printable(said[:length])}", style="none")
    if len(said) > length:
        text.append(f" ({len(said) - length:,} more characters)", style="dim")
    return text
