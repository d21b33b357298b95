"""A judge in a user's own Python file: any callable that takes a question and an answer.

    class MyJudge:                                       # or a function
        scores = ("aligned", "coherent", "friendly")
        def __call__(self, question: str, answer: str) -> dict[str, float | None]: ...

It returns 0 to 100 by score, or None for an answer that it cannot score. `aligned` and `coherent` make the verdicts;
other scores are shown as means. True or False is a verdict on a right answer: a bank names such a matcher as
`judge: my_file.py:same`, and it also gets `expected` and `meta` where it has parameters of these names.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.core.user_code import absolute_spec, load_object
from ema_scale.evaluation.judges.base import CORRECT, INCORRECT, ExactJudge, JudgeItem
from ema_scale.evaluation.judges.scores import VERDICT_PROMPTS
from ema_scale.evaluation.records import Judgement

OWN = "python"


def own_identity(spec: str) -> str:
    """`python:MyJudge#...`: it changes with the file, so that stored judgements are not taken for another judge's."""
    path, _, name = absolute_spec(spec).rpartition(":")
    load_object(spec)
    return f"{OWN}:{name}#{file_sha256(path)[:8]}"


def own_scores(spec: str) -> tuple[str, ...]:
    """The names of the scores that the judge gives. Default: `aligned` and `coherent`."""
    return tuple(getattr(load_object(spec), "scores", VERDICT_PROMPTS))


def own_judge(spec: str) -> ExactJudge:
    """The judge of `file.py:Name`. Raises UserError if that is not callable, or for a reply that is no score."""
    found = load_object(spec)
    judge = found() if isinstance(found, type) else found
    if not callable(judge):
        raise UserError(f"evaluation.judge.kind: {spec}: expected a function, or a class with __call__")

    wanted = [name for name in ("expected", "meta") if name in inspect.signature(judge).parameters]

    def verdict(item: JudgeItem) -> Judgement:
        try:
            reply = judge(item.question, item.answer, **{name: getattr(item, name) for name in wanted})
        except Exception as error:
            raise UserError(f"{spec}: {item.key}: {type(error).__name__}: {error}") from error
        return _judgement(spec, item, reply)

    return ExactJudge(verdict)


def _judgement(spec: str, item: JudgeItem, reply: Any) -> Judgement:
    if isinstance(reply, bool):
        return Judgement(key=item.key, judge=item.judge, label=CORRECT if reply else INCORRECT)
    if not isinstance(reply, Mapping) or not all(_is_score(value) for value in reply.values()):
        raise UserError(
            f"{spec}: {item.key}: returned {reply!r:.80}, expected a score from 0 to 100, or None, by name, or "
            "True or False"
        )
    values = {str(name): None if value is None else float(value) for name, value in reply.items()}
    others = {name: value for name, value in values.items() if name not in VERDICT_PROMPTS}
    unread = [name for name, value in values.items() if value is None]
    return Judgement(
        key=item.key,
        judge=item.judge,
        aligned=values.get("aligned"),
        coherent=values.get("coherent"),
        scores=others or None,
        dropped=f"the judge gave no score for {', '.join(unread)}" if unread else None,
    )


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 100)
