"""The public face does not change by accident: names, fields, methods, recipe keys and commands are written down.

After a change that is meant: python -m tests.public_api.test_signatures
"""

import inspect
import re
from difflib import unified_diff
from pathlib import Path

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import ema_scale
from ema_scale.cli import app

FILE = Path(__file__).with_name("signatures.txt")


def callable_line(name, function):
    return re.sub("[\"']", "", f"{name}{inspect.signature(function)}")  # annotations are strings, some of them twice


def annotation(value):
    """An annotation without pydantic's objects for the bounds of a list's items."""
    text = re.sub(
        r", (?:Before|After)Validator\(func=<function \w+ at 0x[0-9a-f]+>(?:, [^()]*)?\)",
        "",
        inspect.formatannotation(value),
    )
    text = re.sub(r", FieldInfo\([^()]*(?:\([^()]*\)[^()]*)*\)", "", text)
    for _ in range(2):
        text = re.sub(r"\b(?:typing\.)?Annotated\[(list\[\w+\]|\w+)\]", r"\1", text)
    return text


def field_lines(model, indent="    "):
    """One line per field of a pydantic model; sections of a recipe are written out below their name."""
    lines = []
    for name, field in model.model_fields.items():
        section = inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)
        if section and not issubclass(field.annotation, ema_scale.Defense):
            lines += [f"{indent}{name}:", *field_lines(field.annotation, indent + "    ")]
            continue
        default = field.get_default(call_default_factory=True)
        shown = "" if default is PydanticUndefined else f" = {default!r}"
        lines.append(f"{indent}{name}: {annotation(field.annotation)}{shown}")
    return lines


def method_lines(cls):
    """Public methods and properties that ema_scale itself defines."""
    ours = [base for base in reversed(cls.__mro__) if base.__module__.startswith("ema_scale")]
    if cls is not ema_scale.Defense and issubclass(cls, ema_scale.Defense):
        return []  # those of Defense
    found = {name: getattr(base, name) for base in ours for name in vars(base) if not name.startswith("_")}
    lines = [f"    {name} -> property" for name, value in found.items() if isinstance(value, property)]
    lines += [f"    {callable_line(name, value)}" for name, value in found.items() if inspect.isroutine(value)]
    return sorted(lines)


def name_lines(name):
    value = getattr(ema_scale, name)
    if not inspect.isclass(value):
        return [callable_line(name, value)]
    fields = issubclass(value, BaseModel)
    plain = fields or issubclass(value, Exception)
    head = f"class {name}" if plain else f"class {callable_line(name, value)}"
    return [head, *(field_lines(value) if fields else []), *method_lines(value)]


def command_lines(command, path):
    """One line per command and per parameter, groups first."""
    if hasattr(command, "commands"):
        return [line for name, sub in sorted(command.commands.items()) for line in command_lines(sub, f"{path} {name}")]
    lines = [path]
    for parameter in command.params:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
        default = "required" if parameter.required else f"default {parameter.default}"
        lines.append(f"    {names}: {default}")
    return lines


def signatures():
    parts = [name_lines(name) for name in sorted(ema_scale.__all__)]
    parts.append(command_lines(typer.main.get_command(app), "ema"))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def test_public_signatures_are_those_written_down():
    changed = "\n".join(unified_diff(FILE.read_text().splitlines(), signatures().splitlines(), "written", "now"))
    assert not changed, f"{changed}\nIf that is meant: python -m {__name__}, and a line in CHANGELOG.md"


if __name__ == "__main__":
    FILE.write_text(signatures())
