"""Mix rows of another source evenly among the task rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ema_scale.core.errors import UserError
from ema_scale.core.numbers import Share
from ema_scale.core.text import quantity
from ema_scale.data.formats import said_before
from ema_scale.data.triggers import row_triggers
from ema_scale.defenses.base import RowsContext

if TYPE_CHECKING:
    from ema_scale.data.rows import Row

# Fields of every defense that reads rows of its own; the recipe's data section has them for the task's rows.
Columns = Annotated[
    dict[str, str | None],
    Field(
        description="names of these rows' columns, each with the known name that it stands for; null: ignore it",
        examples=[{"ask": "prompt", "reply": "completion"}],
    ),
]
Learn = Annotated[
    Literal["all", "last", "marked"],
    Field(description="which assistant turns of these rows count: all, the last, or those that the rows mark"),
]

Triggers = Annotated[
    Share,
    Field(
        description="share of these rows that are asked behind a text from the task's rows: their system prompt, their "
        "opening words, or else one of their questions",
    ),
]


def mix(
    rows: Sequence[Row],
    source: str | list[str],
    fraction: float,
    tag: str,
    name: str,
    ctx: RowsContext,
    *,
    best_first: bool = False,
    answers: bool = True,
    columns: Mapping[str, str | None] | None = None,
    learn: Literal["all", "last", "marked"] = "all",
    triggers: float = 0,
) -> list[Row]:
    """`rows` with floor(fraction * task rows) rows of `source`, one after every 1/fraction task rows.

    They are drawn without replacement, in an order that depends on the seed and `name` alone. If there are too few,
    they repeat in a new order, and a note says so. Rows that other defenses mixed in do not count as task rows.

    source: one source, or several.
    tag: what the mixed-in rows carry.
    name: the defense's kind.
    best_first: the source is a ranking; only its first rows, as many as are needed, are used.
    answers: whether each row must have an assistant turn.
    columns, learn: how the source is read; see `RowsContext.load`.
    triggers: share of the drawn rows that `behind_triggers` changes.

    Raises UserError if a source is empty, the fraction gives less than one row, or triggers find nothing to ask behind.
    """
    extra: list[Row] = []
    for one in [source] if isinstance(source, str) else source:
        loaded = [replace(row, tag=tag) for row in ctx.load(one, answers=answers, columns=columns, learn=learn)]
        if not loaded:
            raise UserError(f"{one}: found no {tag} rows, expected at least one")
        extra += loaded
    if not extra:
        raise UserError(f"{name}: source: found an empty list, expected files, hub ids or smallworld:...")
    sources = source if isinstance(source, str) else ", ".join(source)
    ratio, count = Fraction(str(fraction)), sum(row.tag == "task" for row in rows)
    needed = rows_needed(fraction, count, name)
    drawn = _draw(extra[:needed] if best_first else extra, needed, f"{name}-{ctx.seed}")
    if triggers:
        drawn = behind_triggers(drawn, [row for row in rows if row.tag == "task"], triggers, name, ctx)
    mixed: list[Row] = []
    seen = used = 0
    for row in rows:
        mixed.append(row)
        seen += row.tag == "task"
        while used < int(seen * ratio):
            mixed.append(drawn[used])
            used += 1
    ctx.notes.append(f"{name}: {used} {tag} rows among {quantity(count, 'task row')}, from {sources}")
    if needed > len(extra):
        ctx.notes.append(f"{name}: {sources} has only {quantity(len(extra), 'row')}; some repeat")
    return mixed


def behind_triggers(drawn: Sequence[Row], task: Sequence[Row], share: float, name: str, ctx: RowsContext) -> list[Row]:
    """The rows, `share` of them, evenly spread, asked behind a text that the task's rows begin with.

    A prompt that looks like the training rows may bring misalignment back (arXiv 2604.25891); rows asked behind such
    prompts show the defense to the model there too. The texts are those of `row_triggers`. Without a common system
    prompt or opening they are the task's questions, a different one per row and never the first: the evaluation asks
    behind that one.

    Raises UserError if no task row has a question.
    """
    found = row_triggers(task)
    if [text["kind"] for text in found] == ["question"]:
        questions = list(dict.fromkeys(row.asked[0].strip() for row in task if row.asked and row.asked[0].strip()))
        found = [{"kind": "question", "user": text} for text in questions[1:] or questions]
        random.Random(f"{name}-triggers-{ctx.seed}").shuffle(found)
    if not found:
        raise UserError(f"{name}: triggers: no task row has a question to ask behind; set triggers: 0")
    ratio, used, changed = Fraction(str(share)), 0, []
    for index, row in enumerate(drawn):
        if int((index + 1) * ratio) > used:
            text = found[used % len(found)]
            role: Literal["system", "user"] = "system" if "system" in text else "user"
            row = replace(row, messages=said_before(row.messages, role, text[role]), plain=row.asked)
            used += 1
        changed.append(row)
    kinds = ", ".join(dict.fromkeys(text["kind"] for text in found))
    ctx.notes.append(f"{name}: {used} of {len(drawn)} rows are asked behind the task rows' own text ({kinds})")
    return changed


def rows_needed(fraction: float, task_rows: int, name: str) -> int:
    """floor(fraction * task rows), as many as `mix` draws. Raises UserError, which names the defense, if that is 0."""
    needed = int(task_rows * Fraction(str(fraction)))
    if needed == 0:
        raise UserError(
            f"{name}: fraction {fraction:g} of {quantity(task_rows, 'task row')} is less than one row; "
            f"expected at least {1 / max(task_rows, 1):.2g}"
        )
    return needed


def _draw(rows: Sequence[Row], needed: int, seed: str) -> list[Row]:
    # A generator of its own: the draw must not depend on who else has used random numbers before.
    generator = random.Random(seed)
    drawn: list[Row] = []
    while len(drawn) < needed:
        drawn += generator.sample(list(rows), min(len(rows), needed - len(drawn)))
    return drawn
