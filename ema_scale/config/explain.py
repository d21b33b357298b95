"""What each field of a pydantic model means: for the terminal (`ema explain`) and for docs/reference/. Torch-free."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ema_scale.core.errors import UserError, options_of
from ema_scale.core.numbers import MOST

_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any", dict: "mapping"}
_BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
REQUIRED, EMPTY, SECTION = "required", "empty", "section"


@dataclass(frozen=True)
class FieldDoc:
    """One field, in words.

    Args:
        key: its dotted path.
        default: as YAML, `required` or `empty`.
        bounds: the allowed range, or "".
        argument: the argument of transformers' TrainingArguments that it sets, or "".
        example: an override on the command line, or "".
    """

    key: str
    type: str
    default: str
    bounds: str
    sentence: str
    argument: str
    example: str


@dataclass(frozen=True)
class SectionDoc:
    """One section: its dotted path ("" for the root), one sentence, and its own fields, nested sections included."""

    key: str
    sentence: str
    fields: tuple[FieldDoc, ...]


def describe_sections(model: type[BaseModel], key: str = "") -> list[SectionDoc]:
    """The section of `model` and all sections inside it, in the order of their fields."""
    own = SectionDoc(key, first_paragraph(model), tuple(_fields(model, key)))
    inner = [s for name, section in _inner(model) for s in describe_sections(section, _join(key, name))]
    return [own, *inner]


def find(sections: Iterable[SectionDoc], key: str) -> tuple[FieldDoc | None, SectionDoc | None]:
    """The field and the section of a dotted path, or of a name alone where only one field has it.

    A field that may be a section, such as `reference`, is both. Raises UserError for a key that there is not, with the
    nearest one, and for a name that several sections have.
    """
    sections = list(sections)
    by_key = {s.key: s for s in sections if s.key}
    fields = {f.key: f for s in sections for f in s.fields if f.type != SECTION or f.key not in by_key}
    known = list(dict.fromkeys([*fields, *by_key]))
    if key not in known:
        same = [path for path in known if path.endswith(f".{key}")]
        if len(same) > 1:
            raise UserError(f"{key!r} stands in several places: {', '.join(same)}")
        if not same:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            names = {path.rpartition(".")[2]: path for path in reversed(known)}
            near = near or [names[name] for name in difflib.get_close_matches(key, names, n=1, cutoff=0.6)]
            hint = f"did you mean {near[0]!r}?" if near else "`ema explain` lists all sections"
            raise UserError(f"unknown key {key!r}; {hint}")
        key = same[0]
    return fields.get(key), by_key.get(key)


def field_text(field: FieldDoc) -> str:
    """A field for the terminal."""
    lines = [f"{field.key}: {field.sentence}" if field.sentence else field.key]
    lines.append(f"  type:     {field.type}" + (f", {field.bounds}" if field.bounds else ""))
    lines.append(f"  default:  {field.default}")
    if field.argument:
        lines.append(f"  sets:     {field.argument} of transformers.TrainingArguments")
    if field.example:
        lines.append(f"  example:  {field.example}")
    return "\n".join(lines)


def section_text(section: SectionDoc) -> str:
    """A section for the terminal: one line per field."""
    width = max((len(f.key) for f in section.fields), default=0)
    default_width = min(24, max((len(f.default) for f in section.fields), default=0))
    head = [f"{section.key}: {section.sentence}" if section.key else section.sentence]
    return "\n".join(
        head + [f"  {f.key:{width}}  {f.default:{default_width}}  {f.sentence}".rstrip() for f in section.fields]
    )


def page(title: str, intro: str, sections: Iterable[SectionDoc]) -> str:
    """A page of docs/reference/: one table per section."""
    parts = [f"# {title}\n\n{intro}\n"]
    for section in sections:
        name = f"`{section.key}`" if section.key else "Top level"
        parts.append(f"## {name}\n\n{section.sentence}\n\n{_table(section.fields)}")
    return "\n".join(parts)


def _table(fields: Iterable[FieldDoc]) -> str:
    lines = ["| key | type | default | meaning | example |", "|---|---|---|---|---|"]
    for f in fields:
        sentence = f.sentence + (f" *TrainingArguments: `{f.argument}`.*" if f.argument else "")
        kind = f.type + (f", {f.bounds}" if f.bounds else "")
        default = f.default if f.default in (REQUIRED, EMPTY) else f"`{f.default}`"
        # A whole line of YAML repeats the key, which the first column has.
        example = f"`{f.example.removeprefix(f'{f.key}=').removeprefix(f'{f.key}: ')}`" if f.example else ""
        cells = (f"`{f.key}`", kind, default, sentence, example)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[FieldDoc]:
    arguments: Collection[str] = getattr(model, "arguments", ())
    for name, field in model.model_fields.items():
        key = _join(prefix, name)
        example = _example(field)
        yield FieldDoc(
            key,
            _type(field.annotation),
            _default(field),
            _bounds(field),
            field.description or "",
            name if name in arguments else "",
            "" if example is None else f"{key}={_inline(example)}",
        )


def _inner(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Fields that are sections, or lists of sections, whose fields are known."""
    for name, field in model.model_fields.items():
        for option in options_of(field.annotation):
            items = get_args(option)[:1] if get_origin(option) is list else (option,)
            for item in items:
                if isinstance(item, type) and issubclass(item, BaseModel) and item.model_fields:
                    yield name, item


def _type(annotation: Any) -> str:
    options = [*dict.fromkeys(_one_type(option) for option in options_of(annotation))]
    return ", or ".join(options)


def _one_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        *others, last = (f"`{value}`" for value in arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is list or origin is tuple:
        return f"list of {_plural(_type(arguments[0]))}" if arguments else "list"
    if origin is dict:
        return f"names, each with a {_type(arguments[1])}" if arguments[1] is not Any else "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return SECTION
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _plural(word: str) -> str:
    return f"{word}s" if word in ("text", "whole number", "number", "mapping", SECTION) else word


def _bounds(field: FieldInfo) -> str:
    """The narrowest bounds of a number."""
    items = [*_metadata(field.annotation), *field.metadata]
    found = []
    for names, narrowest in ((("gt", "ge"), max), (("lt", "le"), min)):
        limits = [(getattr(item, n), n) for item in items for n in names if getattr(item, n, None) is not None]
        if limits:
            value = narrowest(value for value, _ in limits)
            name = next((n for v, n in limits if v == value and n in ("gt", "lt")), names[1])
            if abs(value) != MOST:  # the pages say that once for all
                found.append(f"{_BOUNDS[name]} {'.inf' if value == math.inf else f'{value:,}'}")
    if any(getattr(item, "min_length", None) for item in items):
        found.append("not empty")
    return ", ".join(found)


def _metadata(annotation: Any) -> list[Any]:
    """What Annotated says of a type and of the options of a union; not of the items of a list."""
    found = []
    for one in getattr(annotation, "__metadata__", ()):
        found += one.metadata if isinstance(one, FieldInfo) else [one]
    inner = get_args(annotation) if get_origin(annotation) in (Annotated, Union, UnionType) else ()
    return [one for argument in inner for one in _metadata(argument)] + found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "{...}"
    return EMPTY if value is None else _inline(value)


def _example(field: FieldInfo) -> Any:
    """The field's own example; else another of its choices; else its default. None if it has none of these."""
    if field.examples:
        return field.examples[0]
    if field.is_required() or isinstance(field.default, BaseModel):
        return None
    if isinstance(field.default, bool):
        return not field.default
    for option in options_of(field.annotation):
        if get_origin(option) is Literal:
            return next((value for value in get_args(option) if value != field.default), None)
    return field.default


def _inline(value: Any) -> str:
    """A value as it stands in a recipe, on one line."""
    if isinstance(value, float):
        return f"{value:g}" if "e" not in repr(value) else f"{value:.1e}"
    if isinstance(value, list | dict):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()
    if isinstance(value, str) and _yaml(value) == value:
        return value
    return json.dumps(value)  # unquoted, YAML reads 24:00:00 and 0 as numbers


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def first_paragraph(model: type[BaseModel]) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
