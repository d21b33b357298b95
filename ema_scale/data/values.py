"""Values of a record: text, flags, and JSON within text, each read in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_TEXT_PARTS = ("text", "input_text", "output_text")


class BadRow(ValueError):
    """A record that is no conversation to learn from; the message says what was found and what is expected."""


def text_of(content: Any, where: str) -> str:
    """Text, or the text parts of a list put together. Raises BadRow for anything else, and for what is not Unicode."""
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"{where}: found {short(content)}, expected text")
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{where}: found half a character ({content[error.start]!r}), expected Unicode text") from None
    return content


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS:
        found = f"a part of type {kind!r}" if kind else short(part)
        raise BadRow(f"{where}: found {found}, expected text; only text can be learned from")
    text = part.get("text") if part.get("text") is not None else part.get("value")
    if not isinstance(text, str):
        raise BadRow(f"{where}: found a text part that holds {short(text)}, expected text")
    return text


def flag(value: Any, where: str) -> bool:
    """Whether a turn is learned: true, false, 1 or 0."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": 1, "0": 0}.get(value.strip().lower(), value)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise BadRow(f"{where}: found {short(value)}, expected 0 or 1: a turn is learned or it is not")


def parsed(value: Any) -> Any:
    """A value that a table keeps as JSON text, such as a CSV's `messages`; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def short(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
