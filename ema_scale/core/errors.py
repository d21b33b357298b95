"""The exception whose message is for the user, and pydantic's errors as such messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin


class UserError(Exception):
    """Bad input. The message names the file, line or field, what was found and what is expected.

    `ema` prints it without a traceback and exits with code 2.
    """


def check_schema(path: Path, found: int, known: int) -> None:
    """Raises UserError if a file has a newer schema than this version of the package knows."""
    if found > known:
        raise UserError(f"{path}: schema: found {found}, expected at most {known}; a newer ema_scale wrote it: upgrade")


def explain_all(error: Any, model: Any) -> list[str]:
    """One line per field of a pydantic ValidationError of `model`. Options of a union share a line."""
    by_field: dict[str, list[Any]] = {}
    for problem in error.errors():
        by_field.setdefault(_field(problem, model), []).append(problem)
    lines = []
    for field, problems in by_field.items():
        expected = list(dict.fromkeys(_expected(problem, model) for problem in problems))
        if len(expected) > 1 and all(text.startswith(_START) for text in expected):
            options = " or ".join(text.removeprefix(_START) for text in expected)
            lines.append(f"{field}: {_START}{options}; found {_shown(problems[0]['input'])}")
        else:
            lines.extend(explain(problem, model) for problem in problems)
    return lines


def explain(problem: Any, model: Any) -> str:
    """One line for one pydantic problem with `model`: the field, what was found, what is expected."""
    field = _field(problem, model)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {field!r}; {_hint(str(problem['loc'][-1]), field, model)}"
    if problem["type"] == "missing":
        return f"{field}: missing; this field is required"
    where = f"{field}: " if field else ""  # a problem of several fields together has none
    if problem["type"] == SECRET:
        return f"{where}{problem['msg']}"
    return f"{where}{_expected(problem, model)}; found {_shown(problem['input'])}"


SECRET = "secret"  # the type of a problem whose input is not shown


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


_LONGEST = 200


def _number(value: float) -> str:
    return f"{int(value):,}" if abs(value) < 1e15 and value == int(value) else f"{value:g}"


_START = "expected "

_EXPECTED_BY_TYPE = {
    "dict_type": "a mapping, such as {key: value}",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def _expected(problem: Any, model: Any) -> str:
    """What pydantic expected, in plain words; the text of our own validators as it is."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _EXPECTED_BY_TYPE:
        return _START + _EXPECTED_BY_TYPE[kind]
    match kind:
        case "model_type" | "model_attributes_type":
            section = _section_at(model, _field(problem, model).split("."))
            key = next(iter(section.model_fields), "key") if section is not None else "key"
            return f"expected a mapping, such as {{{key}: ...}}"
        case "greater_than":
            return f"expected a number greater than {_number(context['gt'])}"
        case "greater_than_equal":
            return f"expected a number of at least {_number(context['ge'])}"
        case "less_than":
            return f"expected a number less than {_number(context['lt'])}"
        case "less_than_equal":
            return f"expected a number of at most {_number(context['le'])}"
        case "literal_error" | "enum":
            return f"expected {context['expected'].replace(chr(39), '')}"
        case "string_too_short":
            return "expected text that is not empty"
        case "string_too_long":
            return f"expected text of at most {context['max_length']} characters"
        case "too_short":
            least = context["min_length"]
            return f"expected at least {least} {'entry' if least == 1 else 'entries'}"
        case "string_pattern_mismatch":
            return _PATTERNS.get(context["pattern"], f"expected text of the form {context['pattern']}")
    message = problem["msg"].removeprefix("Value error, ")
    return str(message[:1].lower() + message[1:])


_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "expected letters, digits, '.', '_' and '-', beginning with a letter or digit",
    r"^[^\n]*$": "expected a single line",
}


def _hint(key: str, field: str, model: Any) -> str:
    """Which key was meant: one of the same section, or one that stands in another section; else the known ones."""
    section = _section_at(model, field.split(".")[:-1])
    if section is None:
        return "this section has no fields of its own"
    if key in getattr(section, "key_hints", {}):
        return str(section.key_hints[key])
    known = list(section.model_fields)
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"did you mean {near[0]!r}?"
    elsewhere = {path.rpartition(".")[2]: path for path in _paths(model)}
    if near := difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.8):
        return f"did you mean {elsewhere[near[0]]!r}?"
    return f"known keys: {', '.join(known)}"


def _field(problem: Any, model: Any) -> str:
    """The dotted path of a problem's field. pydantic also names the option of a union, which no user wrote."""
    annotation, path = model, []
    location = list(problem["loc"])
    while location:
        part = location.pop(0)
        if problem["type"] == "extra_forbidden" and not location:
            path.append(str(part))
            break
        options = options_of(annotation)
        if len(options) > 1:
            tagged = [o for o in options if _is_tag(part, o)]
            if tagged:
                annotation = tagged[0]
                continue
        path.append(str(part))
        annotation = _inside(options, part)
    return ".".join(path)


def _is_tag(part: Any, option: Any) -> bool:
    """Whether pydantic calls an option of a union so: `str`, `list[str]`, `literal['a','b']`, a class's name."""
    if not isinstance(part, str):
        return False
    if isinstance(option, type) and not get_args(option):
        return part in (option.__name__, f"constrained-{option.__name__}")
    origin = get_origin(option)
    name = getattr(origin, "__name__", str(origin)).lower().removeprefix("typing.")
    return re.match(rf"(function-\w+\[.*)?{re.escape(name)}\[", part.lower()) is not None


def options_of(annotation: Any) -> list[Any]:
    """The options of a type: a union's without None, else the type itself."""
    if get_origin(annotation) is Annotated:
        return options_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [o for a in get_args(annotation) if a is not type(None) for o in options_of(a)]
    return [annotation]


def _inside(options: Sequence[Any], part: Any) -> Any:
    """The type at `part` of a value of one of these types; None if it is not known."""
    for option in options:
        fields = getattr(option, "model_fields", None)
        if fields is not None:
            if part in fields:
                return fields[part].annotation
        elif arguments := get_args(option):
            return arguments[-1]  # of a list its items, of a mapping its values
    return None


def _section_at(model: Any, path: Sequence[str]) -> Any:
    annotation = model
    for part in path:
        annotation = _inside(options_of(annotation), part)
    return next((o for o in options_of(annotation) if hasattr(o, "model_fields")), None)


def _paths(model: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields of nested sections, shallow ones last, so that they win in a mapping by name."""
    own: Mapping[str, Any] = getattr(model, "model_fields", {})
    for name, field in own.items():
        for option in options_of(field.annotation):
            if hasattr(option, "model_fields"):
                yield from _paths(option, f"{prefix}{name}.")
    yield from (f"{prefix}{name}" for name in own)
