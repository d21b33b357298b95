"""Where each text of a conversation stands in its rendering: found by rendering it with marks around every text.

A mark is a private-use character. Marks stand directly at the text, inside the blanks around it, so that templates
which trim, or cut reasoning off at its tags, do with marks what they do without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from ema_scale.core.thoughts import CLOSING_TAGS, TAGS
from ema_scale.data.formats import Message

# Private-use characters, by where they begin and how many there are.
RANGES = ((0xE000, 6400), (0xF0000, 65534), (0x100000, 65534))
Kind = Literal["content", "thought", "call"]


class Part(NamedTuple):
    """One text of a message. kind: what it is; place: where it begins in the message's content, -1 if not there."""

    message: int
    kind: Kind
    text: str
    place: int = -1


class Place(NamedTuple):
    """Where a part stands: characters start to end of the rendering."""

    part: int
    start: int
    end: int


class Marker:
    """Marks of one conversation: `messages` with marks in their texts, and the parts that were marked.

    start, size: the private-use characters to take as marks; `fits` says whether they are enough. inside: marks stand
    in the middle of a text, for templates that look at how one begins or ends.
    """

    def __init__(self, messages: Sequence[Message], start: int, size: int, *, inside: bool = False) -> None:
        self._base, self._size, self._marks, self._inside = start, size, _marks(start, size), inside
        self.parts: list[Part] = []
        self.shape: list[tuple[int, Kind]] = []
        self.messages = [self._marked(index, message) for index, message in enumerate(messages)]
        self.fits = 2 * len(self.parts) <= size

    def _marked(self, index: int, message: Message) -> Message:
        content = message["content"]
        if message["role"] != "assistant":
            return {**message, "content": self._put(index, "content", content, 0)}
        marked = Message(**{**message, "content": "".join(self._content(index, content))})
        if thought := message.get("reasoning_content"):
            marked["reasoning_content"] = self._put(index, "thought", thought)
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self._call(index, call) for call in calls]
        return marked

    def _content(self, index: int, content: str) -> Iterator[str]:
        position, kind = 0, "content"
        for tag in TAGS.finditer(content):
            closes = tag.group() in CLOSING_TAGS
            yield self._put(index, "thought" if closes else "content", content[position : tag.start()], position)
            yield tag.group()
            position, kind = tag.end(), "content" if closes else "thought"
        yield self._put(index, kind, content[position:], position)  # type: ignore[arg-type]

    def _call(self, index: int, call: Any) -> Any:
        function = call["function"]
        arguments = self._leaves(index, function["arguments"])
        return {**call, "function": {"name": self._put(index, "call", function["name"]), "arguments": arguments}}

    def _leaves(self, index: int, value: Any) -> Any:
        if isinstance(value, str):
            return self._put(index, "call", value)
        if isinstance(value, dict):
            return {key: self._leaves(index, one) for key, one in value.items()}
        return [self._leaves(index, one) for one in value] if isinstance(value, list) else value

    def _put(self, index: int, kind: Kind, text: str, place: int = -1) -> str:
        core = text.strip()
        if not core:
            return text
        number, start = 2 * len(self.parts), len(text) - len(text.lstrip())
        self.shape.append((index, kind))
        self.parts.append(Part(index, kind, core, place + start if place >= 0 else -1))
        if number + 2 > self._size:
            return text
        first, last = chr(self._base + number), chr(self._base + number + 1)
        if self._inside:
            middle = start + len(core) // 2
            return f"{text[:middle]}{first}{last}{text[middle:]}"
        return f"{text[:start]}{first}{core}{last}{text[start + len(core) :]}"

    def read(self, marked: str) -> tuple[str, list[Place]]:
        """A rendering of the marked messages without its marks, and where the parts stand in it, in order."""
        pieces = self._marks.split(marked)
        position, opened, places = 0, {}, []
        for index, piece in enumerate(pieces):
            if index % 2 == 0:
                position += len(piece)
                continue
            number, closes = divmod(ord(piece) - self._base, 2)
            if not closes:
                opened[number] = position
            elif number in opened:
                places.append(self._place(number, opened.pop(number), position))
        return "".join(pieces[::2]), places

    def _place(self, number: int, start: int, end: int) -> Place:
        if not self._inside:
            return Place(number, start, end)
        length = len(self.parts[number].text)
        start -= length // 2
        return Place(number, start, start + length)


@cache
def _marks(start: int, size: int) -> re.Pattern[str]:
    return re.compile(f"([{chr(start)}-{chr(start + size - 1)}])")
