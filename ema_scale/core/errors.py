"""The exception whose message is for the user, and pydantic's errors as such messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin


class UserError(Exception):
    """Bad input. The message names the file, line or field, what was found and what is expected.

    `ema` prints it without a traceback and exits with code 2.
    """


def explain(problem: Any, model: Any) -> str:
    """One line for one pydantic problem with `model`: the field, what was found, what is expected."""
    field = ".".join(str(part) for part in problem["loc"] if part not in ("str", "list[str]"))
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {field!r}; {hint}"
    if problem["type"] == "missing":
        return f"{field}: missing; this field is required"
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{field}: " if field else ""  # a problem of several fields together has none
    return f"{where}{message[0].lower() + message[1:]}; found {problem['input']!r}"


def _known_keys(model: Any, location: Sequence[Any]) -> list[str]:
    section: Any = model
    for part in location:
        if isinstance(part, int):  # an item of a list: its type was taken below
            continue
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        options = get_args(annotation) if get_origin(annotation) in (Union, UnionType, list) else (annotation,)
        section = next((o for o in options if isinstance(o, type) and hasattr(o, "model_fields")), None)
        if section is None:
            return []
    return list(section.model_fields)
