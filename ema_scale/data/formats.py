"""The shapes in which the field stores conversations, turned into messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant", "tool")


_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"))


_KNOWN = "messages, conversations, prompt/completion, question/answer, instruction/output or input/output"


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


class BadRow(ValueError):
    """A record that is no conversation to learn from; the message says what was found and what is expected."""


def to_messages(record: Any, columns: Mapping[str, str] | None = None, *, answers: bool = True) -> tuple[Message, ...]:
    """The conversation of one record, in any of the field's formats.

    Formats: `messages` (role, content), ShareGPT `conversations` (from, value), pairs such as prompt/completion (text,
    or lists of messages), and instruction/input/output. columns renames a record's own columns first (theirs -> ours).
    Without answers, a record may also be messages of no assistant, or a lone prompt, question or instruction. Raises
    BadRow if there is no assistant turn to learn and there should be, or a turn is not what it should be.
    """
    if not isinstance(record, Mapping):
        raise BadRow(f"found {type(record).__name__}, expected an object")
    if columns:
        record = {columns.get(key, key): value for key, value in record.items()}
    messages = _find(record, answers)
    if answers and not any(m["role"] == "assistant" for m in messages):
        raise BadRow("found no assistant turn, expected at least one to learn from")
    return messages


def _find(record: Mapping[str, Any], answers: bool) -> tuple[Message, ...]:
    system = record.get("system")
    head: list[Message] = [_message("system", system, "system")] if isinstance(system, str) and system else []
    if record.get("messages") is not None:
        return (*head, *_turns(record["messages"], "messages", "role", "content"))
    if record.get("conversations") is not None:
        turns = record["conversations"]
        ours = isinstance(turns, Sequence) and bool(turns) and isinstance(turns[0], Mapping) and "role" in turns[0]
        keys = ("role", "content") if ours else ("from", "value")
        return (*head, *_turns(turns, "conversations", *keys))
    if record.get("instruction") is not None and "output" in record:
        extra = record.get("input")
        asked = f"{record['instruction']}\n\n{extra}" if extra else record["instruction"]
        return (
            *head,
            _message("user", asked, "instruction"),
            _message("assistant", record["output"], "output"),
        )
    for asked_key, answered_key in _PAIRS:
        if asked_key in record and answered_key in record:
            asked, answered = record[asked_key], record[answered_key]
            return (*head, *_side(asked, "user", asked_key), *_side(answered, "assistant", answered_key))
    alone = [key for key in ("prompt", "question", "instruction", "input") if record.get(key)]
    if alone and not answers:
        return (*head, *_side(record[alone[0]], "user", alone[0]))
    raise BadRow(f"found the columns {', '.join(map(repr, record)) or 'none'}; expected {_KNOWN}")


def _side(value: Any, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (_message(role, value, where),)
    return _turns(value, where, "role", "content")


def _turns(value: Any, where: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise BadRow(f"{where}: found {found}, expected a list of turns")
    turns = []
    for index, turn in enumerate(value):
        here = f"{where}.{index}"
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            raise BadRow(f"{here}: found {_short(turn)}, expected an object with {role_key!r} and {content_key!r}")
        role = _SHAREGPT_ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise BadRow(f"{here}.{role_key}: found {_short(turn[role_key])}, expected one of {', '.join(ROLES)}")
        turns.append(_message(role, turn[content_key], f"{here}.{content_key}"))
    return tuple(turns)


def _message(role: str, content: Any, where: str) -> Message:
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"{where}: found {_short(content)}, expected text")
    if role == "assistant" and not content.strip():
        raise BadRow(f"{where}: found an empty assistant turn, expected text to learn")
    return Message(role=role, content=content)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
