"""The registry of defenses: every class with a `kind` in the files of this package, so a new defense is a new file.

Another package registers its class under the entry-point group `ema_scale.defenses`. A class in a file of one's own
needs no package: its kind is `my_file.py:MyDefense`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.user_code import absolute_spec, is_file_spec, load_object
from ema_scale.defenses.base import Defense

ENTRY_POINTS = PACKAGE = "ema_scale.defenses"


@functools.cache
def built_in() -> dict[str, str]:
    """kind -> "module:Class" of the defenses in this package."""
    classes = {}
    for file in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__):
        module = importlib.import_module(f"{PACKAGE}.{file.name}")
        for name, value in vars(module).items():
            if (
                isinstance(value, type)
                and issubclass(value, Defense)
                and value.__module__ == module.__name__
                and value.kind
            ):
                classes[value.kind] = f"{module.__name__}:{name}"
    return classes


@functools.cache  # a large study asks thousands of times, and entry points are read from the disk
def plugins() -> dict[str, str]:
    """kind -> "module:Class" of the defenses in other installed packages."""
    return {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)}


def known() -> dict[str, str]:
    """kind -> "module:Class" of all defenses. A built-in name wins over a plug-in's."""
    return {**plugins(), **built_in()}


def adapter_files() -> tuple[str, ...]:
    """Names of all files that some defense's `after_training` leaves in an adapter's folder."""
    return tuple(name for kind in built_in() for name in load(kind).adapter_files)


def load(kind: str) -> type[Defense]:
    """The class of a kind or of `file.py:Class`. Raises UserError for an unknown kind, with the nearest known one."""
    if is_file_spec(kind):
        return _from_file(kind)
    classes = known()
    if kind not in classes:
        near = difflib.get_close_matches(kind, classes, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown defense {kind!r}; {hint}known: {', '.join(sorted(classes))}")
    module, _, name = classes[kind].partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"defense {kind!r}: cannot load {classes[kind]} ({error})") from None
    return _checked(cls, kind, classes[kind])


def _from_file(spec: str) -> type[Defense]:
    cls = _checked(load_object(spec), spec, spec)
    cls.defined_in = absolute_spec(spec)
    cls.kind = cls.kind or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    return cls


def _checked(cls: Any, kind: str, place: str) -> type[Defense]:
    if not (isinstance(cls, type) and issubclass(cls, Defense)):
        raise UserError(f"defense {kind!r}: {place} is not a subclass of ema_scale.defenses.Defense")
    return cls


def parse(entries: Sequence[Defense | Mapping[str, Any] | str]) -> list[Defense]:
    """Defenses of a recipe: mappings with `kind`, bare kinds, or Defense objects.

    Raises UserError naming the entry and field, what was found, and the nearest known kind or field.
    """
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence):
        raise UserError(f"defenses: found {type(entries).__name__}, expected a list of {{kind: ..., ...}}")
    parsed = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Defense):
            parsed.append(entry)
            continue
        values = {"kind": entry} if isinstance(entry, str) else entry
        if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
            raise UserError(
                f"defenses.{index}: found {entry!r}, expected a mapping with `kind`, such as {_meant(values)}"
            )
        rest = {str(key): value for key, value in values.items() if key != "kind"}
        try:
            parsed.append(load(values["kind"])(**rest))
        except UserError as error:
            raise UserError(f"defenses.{index}: {error}") from None
    return parsed


def _type(schema: Mapping[str, Any]) -> str:
    """A field's type or choices, from its JSON schema: `auto | all | list of integer`."""
    if "anyOf" in schema:
        return " | ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum") or [schema["const"]]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type") or "any")


def catalogue() -> list[dict[str, Any]]:
    """Every defense: kind, summary, source (citation), what it needs, what it can use, and parameters (name, type,
    default, description)."""
    entries = []
    for kind in sorted(known()):
        cls = load(kind)
        schema = cls.model_json_schema().get("properties", {})
        parameters = [
            {
                "name": name,
                "type": _type(schema[name]),
                "default": "required" if field.is_required() else field.default,
                "description": field.description or "",
            }
            for name, field in cls.model_fields.items()
        ]
        assets = cls.assets()
        needs = [asset for name, asset in assets.items() if cls.model_fields[name].is_required()]
        uses = [asset for asset in assets.values() if asset not in needs]
        reading = ("penalty_layers", "divergences", "label_terms")
        if any(cls.overrides(method) for method in reading) and not cls.without_reference:
            needs.append("a reference pass")
        entries.append(
            {
                "kind": kind,
                "summary": cls.summary,
                "source": cls.citation,
                "needs": needs,
                "uses": uses,
                "parameters": parameters,
            }
        )
    return entries


def _meant(values: Any) -> str:
    """What `{kl: 0.1}` may have been meant for; else an example."""
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if name in known() and "strength" in load(name).model_fields and isinstance(value, int | float):
            return f"{{kind: {name}, strength: {value}}}"
    return "{kind: kl, strength: 0.3}"


def steps_per_drift_reading(asked: int, defenses: Sequence[Defense]) -> int:
    """training.drift_every, or less where a defense needs readings more often; 0: none."""
    needed = [d.drift_every for d in defenses if d.drift_every is not None]
    return min([asked, *needed]) if asked else 0
