"""The shapes in which the field stores conversations, turned into messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from ema_scale.data.tool_calls import read_calls, read_tools
from ema_scale.data.values import BadRow, flag, parsed, short, text_of

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLES = {
    **{role: role for role in ROLES},
    "human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool",
}  # fmt: skip
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"),
    ("question", "response"), ("query", "response"), ("user", "assistant"), ("context", "response"),
)  # fmt: skip
_ANSWERS_OF_INSTRUCTIONS = ("output", "response", "completion", "answer")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_FLAGS = ("weight", "train", "training", "loss", "loss_weight", "loss_mask", "learn")
_MEDIA = ("images", "image", "audios", "audio", "videos", "video")
_PREFERENCES = (
    "chosen", "rejected", "rejected_response", "chosen_response", "response_chosen", "response_rejected",
    "rejected_messages", "chosen_messages",
)  # fmt: skip
_KNOWN = (
    "messages, conversations, prompt/completion, question/answer, instruction/output, input/output or user/assistant; "
    "map other names in data.columns"
)


class Message(TypedDict):
    """One turn.

    reasoning_content: what the assistant thought before it answered. tool_calls: what it asked of tools, each
    {"type": "function", "function": {"name", "arguments"}}. learn: False where an assistant turn is not learned.
    name, tool_call_id: which tool a tool's answer comes from.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    learn: NotRequired[bool]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True)
class Conversation:
    """tools: JSON schemas of functions. unread: columns, and keys of messages, that hold something nothing reads.
    domain: the record's column of that name."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unread: tuple[str, ...] = ()
    domain: str | None = None


def to_conversation(
    record: Any,
    columns: Mapping[str, str | None] | None = None,
    *,
    answers: bool = True,
    learn: Literal["all", "last", "marked"] = "all",
) -> Conversation:
    """The conversation of one record, in any of the field's formats.

    Formats: `messages` (role, content), ShareGPT `conversations` (from, value), a bare list of either, pairs such as
    prompt/completion (text, or lists of messages), and instruction/input/output. Beside them are read: a system prompt,
    Alpaca's `history`, `tools`, `domain`; in a message its reasoning, tool calls, and whether it is learned (weight,
    train, ...).

    Args:
        columns: renames a record's own columns first (theirs -> ours; None: pass over it).
        answers: there must be an assistant turn; else a record may also be a lone prompt, question or instruction.
        learn: all: every assistant turn that is not marked otherwise; last: the last one; marked: those marked.

    Raises BadRow if there is no assistant turn to learn and there should be, a turn is not what it should be, or the
    record is of a kind that cannot be learned from as it is (preferences, KTO labels, images).
    """
    if (
        isinstance(record, list)
        and record
        and all(isinstance(t, Mapping) and {"role", "from"} & t.keys() for t in record)
    ):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise BadRow(f"found {type(record).__name__}, expected an object")
    if columns:
        record = _renamed(record, columns)
    try:
        reader = _Record(record)
        messages = reader.conversation(answers)
        tools = read_tools(reader.take("tools") or reader.take("functions"))
        domain = reader.domain()
    except RecursionError:
        raise BadRow("values that are nested too deeply") from None
    if answers:
        if not any(m["role"] == "assistant" for m in messages):
            raise BadRow("found no assistant turn, expected at least one to learn from")
        _choose_learned(messages, reader.marks, learn)
    return Conversation(tuple(messages), tools, tuple(reader.unread()), domain)


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in record.items():
        name = columns.get(key, key)
        if name is None:
            continue
        if name in out or (name != key and name in record and columns.get(name, name) == name):
            raise BadRow(f"data.columns: two columns become {name!r}; map the other one to null")
        out[name] = value
    return out


class _Record:
    """One record; knows which of its columns were read."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.read: set[str] = set()
        self.loose: list[str] = []  # keys of messages that nothing read
        self.marks: dict[int, bool] = {}  # id of a message -> learned or not, as the record says

    def take(self, key: str) -> Any:
        self.read.add(key)
        return self.record.get(key)

    def has(self, key: str) -> bool:
        return self.record.get(key) is not None

    def unread(self) -> list[str]:
        columns = (k for k, v in self.record.items() if k not in self.read and v not in (None, "", [], {}))
        return [*columns, *dict.fromkeys(self.loose)]

    def domain(self) -> str | None:
        value = self.record.get("domain")
        return str(self.take("domain")).strip() or None if isinstance(value, str) else None

    def conversation(self, answers: bool) -> list[Message]:
        self._refuse_other_kinds()
        return [*self._system(), *self._history(), *self._turns(answers)]

    def _refuse_other_kinds(self) -> None:
        preferences = [key for key in _PREFERENCES if self.record.get(key)]
        if preferences:
            raise BadRow(
                f"found a preference row ({', '.join(preferences)}), expected answers to learn; keep the chosen ones, "
                "and map the other columns to null in data.columns"
            )
        label = self.record.get("label")
        labels = [key for key in ("kto_tag",) if self.has(key)]
        if isinstance(label, bool) or (isinstance(label, str) and label.lower() in ("true", "false")):
            labels.append("label")
        if labels:
            raise BadRow(
                f"found a KTO label ({labels[-1]}: {self.record[labels[-1]]}), expected answers to learn; keep the "
                "desirable ones, and map the column to null in data.columns"
            )
        media = [key for key in _MEDIA if self.record.get(key)]
        if media:
            raise BadRow(f"{media[0]}: found {short(self.record[media[0]])}; only text can be learned from")
        if self.record.get("train_detail"):
            raise BadRow("train_detail: parts of a turn cannot be chosen; use weight or train on turns")

    def _system(self) -> Iterator[Message]:
        found: dict[str, str] = {}
        for key in SYSTEM_COLUMNS:
            value = self.take(key)
            if value not in (None, "", []):
                found[text_of(value, key)] = key
        if len(found) > 1:
            raise BadRow(f"found different system prompts in {' and '.join(found.values())}, expected one")
        for text in found:
            if not self._begins_with(text):
                yield Message(role="system", content=text)

    def _begins_with(self, system: str) -> bool:
        turns = parsed(self.record.get("messages") or self.record.get("conversations") or ())
        first = turns[0] if isinstance(turns, Sequence) and turns else None
        return (
            isinstance(first, Mapping)
            and _role(first) == "system"
            and system in (first.get("content"), first.get("value"))
        )

    def _history(self) -> Iterator[Message]:
        history = parsed(self.take("history"))
        if not history:
            return
        if self.has("messages") or self.has("conversations"):
            raise BadRow("found history beside a whole conversation, expected one of them")
        if not isinstance(history, Sequence) or isinstance(history, str):
            raise BadRow(f"history: found {short(history)}, expected a list of questions and their answers")
        for index, pair in enumerate(history):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise BadRow(f"history.{index}: found {short(pair)}, expected a question and its answer")
            for role, said in zip(("user", "assistant"), pair, strict=True):
                yield self._message(role, said, f"history.{index}")

    def _turns(self, answers: bool) -> Iterator[Message]:
        for key in ("messages", "conversations"):
            if self.has(key):
                yield from self._list(self.take(key), key)
                return
        answer = next((key for key in _ANSWERS_OF_INSTRUCTIONS if self.has(key)), None)
        if self.has("instruction") and answer:
            more = next((key for key in ("input", "context") if self.record.get(key)), None)
            self.read |= {"input", "context"} & {more}
            asked = text_of(self.take("instruction"), "instruction")
            yield Message(role="user", content=f"{asked}\n\n{text_of(self.take(more), more)}" if more else asked)
            yield self._message("assistant", self.take(answer), answer)
            return
        for asked_key, answer_key in _PAIRS:
            if asked_key in self.record and answer_key in self.record:
                yield from self._side(self.take(asked_key), "user", asked_key)
                yield from self._side(self.take(answer_key), "assistant", answer_key)
                return
        alone = [key for key in ("prompt", "question", "instruction", "query", "input") if self.record.get(key)]
        if alone and not answers:
            yield from self._side(self.take(alone[0]), "user", alone[0])
            return
        raise BadRow(f"found the columns {', '.join(map(repr, self.record)) or 'none'}; expected {_KNOWN}")

    def _side(self, value: Any, role: str, where: str) -> Iterator[Message]:
        if isinstance(value, Sequence) and not isinstance(value, str):
            yield from self._list(value, where)
        else:
            yield self._message(role, value, where)

    def _list(self, value: Any, where: str) -> Iterator[Message]:
        value = parsed(value)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            found = "an empty list" if value == [] else short(value) if isinstance(value, str) else type(value).__name__
            raise BadRow(f"{where}: found {found}, expected a list of turns")
        for index, turn in enumerate(value):
            yield self._turn(turn, f"{where}.{index}")

    def _turn(self, turn: Any, here: str) -> Message:
        keys = {("role", "from")[i]: ("content", "value")[i] for i in (0, 1)}
        named = isinstance(turn, Mapping) and next((key for key in keys if turn.get(key) is not None), None)
        if not named:
            raise BadRow(f"{here}: found {short(turn)}, expected an object with 'role' and 'content'")
        role = _role(turn)
        if role is None:
            raise BadRow(f"{here}.{named}: found {short(turn[named])}, expected one of {', '.join(ROLES)}")
        said = next((key for key in (keys[named], "content", "value") if key in turn), None)
        calls = read_calls(turn, str(turn[named]).lower(), turn.get(said) if said else None, here)
        if said is None and not calls:
            raise BadRow(f"{here}: found {short(turn)}, expected an object with {named!r} and {keys[named]!r}")
        content = "" if calls and (str(turn[named]).lower() == "function_call" or said is None) else turn[said or ""]
        message = self._message(role, content, f"{here}.{said}", turn, calls)
        self._mark(message, turn, here)
        known = {named, said, "tool_calls", "function_call", "name", "tool_call_id", *_REASONING, *_FLAGS}
        self.loose += [f"messages.{key}" for key, v in turn.items() if key not in known and v not in (None, "", [], {})]
        return message

    def _message(
        self,
        role: str,
        content: Any,
        where: str,
        turn: Mapping[str, Any] | None = None,
        calls: Sequence[dict[str, Any]] = (),
    ) -> Message:
        turn = turn or {}
        thoughts = [turn[key] for key in _REASONING if turn.get(key)]
        if isinstance(content, list):
            parts = [p for p in content if isinstance(p, Mapping) and p.get("type") in ("reasoning", "thinking")]
            thoughts += [
                next((p[k] for k in ("thinking", "text", "value", "reasoning") if p.get(k)), "") for p in parts
            ]
            content = [p for p in content if p not in parts]
        text = "" if content is None and (calls or thoughts) else text_of(content, where)
        message = Message(role=role, content=text)
        thought = "\n".join(dict.fromkeys(text_of(t, f"{where} (reasoning)") for t in thoughts))
        if thought.strip():
            if role != "assistant":
                raise BadRow(f"{where}: found reasoning in a turn of {role}, expected it in the assistant's")
            message["reasoning_content"] = thought
        if calls:
            if role != "assistant":
                raise BadRow(f"{where}: found tool calls in a turn of {role}, expected them in the assistant's")
            message["tool_calls"] = list(calls)
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str) and role == "tool":
                message[key] = text_of(turn[key], f"{where} ({key})")
        if role == "assistant" and not text.strip() and not calls:
            raise BadRow(f"{where}: found an empty assistant turn, expected text to learn")
        return message

    def _mark(self, message: Message, turn: Mapping[str, Any], here: str) -> None:
        marks = {key: flag(turn[key], f"{here}.{key}") for key in _FLAGS if turn.get(key) is not None}
        if len({*marks.values()}) > 1:
            raise BadRow(f"{here}: found {' and '.join(marks)} that contradict each other")
        if not marks:
            return
        wanted = next(iter(marks.values()))
        if message["role"] == "assistant":
            self.marks[id(message)] = wanted
        elif wanted:
            raise BadRow(f"{here}.{next(iter(marks))}: found a turn of {message['role']} to be learned; only the "
                         "assistant's are")  # fmt: skip


def _role(turn: Mapping[str, Any]) -> str | None:
    return _ROLES.get(str(turn.get("role") if turn.get("role") is not None else turn.get("from")).lower())


def _choose_learned(messages: Sequence[Message], marks: Mapping[int, bool], learn: str) -> None:
    turns = [m for m in messages if m["role"] == "assistant"]
    wanted = {
        "all": [m for m in turns if marks.get(id(m), True)],
        "last": [m for m in turns[-1:] if marks.get(id(m), True)],
        "marked": [m for m in turns if marks.get(id(m), False)],
    }[learn]
    if not wanted:
        raise BadRow(
            "found no assistant turn that is marked to be learned (weight, train, ...)"
            if learn == "marked"
            else "found only assistant turns that are marked not to be learned"
        )
    for message in turns:
        if not any(message is one for one in wanted):
            message["learn"] = False


def said_before(messages: Sequence[Message], role: Literal["system", "user"], text: str) -> tuple[Message, ...]:
    """The conversation with `text` and an empty line before the first words of that role, or as its first message."""
    for index, message in enumerate(messages):
        if message["role"] == role:
            joined = Message(**{**message, "content": f"{text}\n\n{message['content']}"})
            return (*messages[:index], joined, *messages[index + 1 :])
    # A user's words come after the system prompts with which the conversation begins.
    first = ("system", "developer") if role == "user" else ()
    place = next((i for i, m in enumerate(messages) if m["role"] not in first), len(messages))
    return (*messages[:place], Message(role=role, content=text), *messages[place:])
