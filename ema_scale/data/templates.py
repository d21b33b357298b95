"""A tokenizer's chat template: rendering with one date, and what the template can show, found out by probes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date as Date
from datetime import datetime
from functools import cached_property
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.thoughts import opened_by
from ema_scale.data.formats import Message
from ema_scale.data.tool_calls import map_text

# For base models such as GPT-2, which come without one.
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ 'User: ' + m['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_BREAK = "\u200b"


def _said(role: str, mark: str, **more: Any) -> Message:
    return Message(role=role, content=f"qz{mark}qz", **more)  # type: ignore[typeddict-item]


_S, _U, _A = _said("system", "s"), _said("user", "u"), _said("assistant", "a")
_S2, _U2, _A2 = _said("system", "late"), _said("user", "uu"), _said("assistant", "aa")
_CALL = {"type": "function", "id": "call00000", "function": {"name": "qzcallqz", "arguments": {"k": "qzargqz"}}}
_TOOL = {"type": "function", "function": {"name": "qztoolqz", "description": "", "parameters": {}}}


class ChatTemplate:
    """The chat template of a tokenizer, with the date that it writes if it writes one.

    special: the tokenizer's special tokens as text, longest first.
    """

    def __init__(self, tokenizer: Any, date: Date | None = None) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError("the tokenizer has no chat template; load it with ema_scale.data.tokens.load_tokenizer")
        self.tokenizer = tokenizer
        self.date = date or datetime.now().date()
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._given = {**tokenizer.special_tokens_map, "strftime_now": self._strftime}
        self.special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self.special)) or r"(?!)")

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, generation_prompt: bool = False
    ) -> str:
        """The conversation as the template writes it. Raises UserError if the template refuses it."""
        return self.rendered(messages, tools, generation_prompt=generation_prompt)[0]

    def rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = False,
        spans: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and, if asked for, the character spans of the template's own `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            made: Any = render_jinja_template(
                conversations=[[self._as_taken(m) for m in messages]],
                tools=list(tools) or None,  # type: ignore[arg-type]
                chat_template=self.tokenizer.get_chat_template(tools=list(tools) or None),
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=spans,
                **self._given,
            )
        except Exception as error:  # a template is somebody's program: it may fail in any way
            roles = ", ".join(m["role"] for m in messages)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"the chat template refuses a conversation of roles {roles}: {reason}") from None
        texts, found = made
        return texts[0], [tuple(span) for span in found[0]] if spans else []

    @cached_property
    def written_date(self) -> str:
        """The date that the template writes, YYYY-MM-DD; "" if it writes none."""
        return self.date.isoformat() if "strftime_now" in str(self.tokenizer.chat_template) else ""

    def _strftime(self, form: str) -> str:
        return datetime(self.date.year, self.date.month, self.date.day).strftime(form)

    def _as_taken(self, message: Message) -> dict[str, Any]:
        if len(message) == 2 and not self.takes_parts:
            return message  # type: ignore[return-value]
        taken = {k: v for k, v in message.items() if k not in ("learn", "reasoning_content", "tool_calls")}
        if thought := message.get("reasoning_content"):
            taken |= {"reasoning_content": thought, "thinking": thought, "reasoning": thought}
        if calls := message.get("tool_calls"):
            taken["tool_calls"] = [self._call_as_taken(call) for call in calls] if self.text_arguments else calls
        if self.takes_parts:
            taken["content"] = [{"type": "text", "text": message["content"]}]
        return taken

    def _call_as_taken(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {
            **call,
            "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
        }

    def _shows(self, messages: Sequence[Message], *marks: str, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether the template takes these messages and shows the marks in this order."""
        try:
            text = self.render(messages, tools)
        except UserError:
            return False
        places = [text.find(f"qz{mark}qz") for mark in marks]
        return min(places) >= 0 and places == sorted(places)

    # The two that `render` itself asks for are found with the other answer first.
    takes_parts = False
    text_arguments = False

    def probe(self) -> None:
        """Find out how the template takes content and arguments."""
        if not self._shows([_U, _A], "u", "a"):
            self.takes_parts = True
            self.takes_parts = self._shows([_U, _A], "u", "a")
        called = [_U, Message(role="assistant", content="", tool_calls=[_CALL])]
        if not self._shows(called, "call", "arg"):
            self.text_arguments = True
            self.text_arguments = self._shows(called, "call", "arg")

    @cached_property
    def marks_generation(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", str(self.tokenizer.get_chat_template())) is not None

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message is shown, and at the same place whatever follows it.

        Gemma's refuses it; Mistral v0.3's shows it in the last user turn only.
        """
        turns = [_S, _U, _A, _U2, _A2]
        return all(self._shows(turns[:n], *("s", "u", "a", "uu", "aa")[:n]) for n in (2, 3, 4, 5))

    @cached_property
    def takes_late_system(self) -> bool:
        """Whether a system message is shown where it stands when it is not the first message."""
        return self.takes_system and self._shows([_U, _A, _S2, _U2, _A2], "u", "a", "late", "uu", "aa")

    @cached_property
    def takes_developer(self) -> bool:
        return self._shows([_said("developer", "d"), _U, _A], "d", "u", "a")

    @cached_property
    def shows_reasoning(self) -> bool:
        return self._shows([_U, _said("assistant", "a", reasoning_content="qzthoughtqz")], "thought", "a")

    @cached_property
    def shows_tools(self) -> bool:
        return self._shows([_U], "tool", tools=[_TOOL])

    @cached_property
    def ends(self) -> tuple[str, str]:
        """The special tokens right after an answer that ends the conversation, and after one that does not; "" for
        none."""
        return self._end_after([_U, _A]), self._end_after([_U, _A, _U2, _A2])

    def _end_after(self, messages: Sequence[Message]) -> str:
        try:
            tail = self.render(messages).partition("qzaqz")[2].lstrip()
        except UserError:
            return ""
        found = self._special.match(tail)
        return found.group() if found else ""

    @property
    def end_of_turn(self) -> str:
        """The token that ends an answer; "" if there is none."""
        last, earlier = self.ends
        return last or earlier

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds where an answer is to begin, after a user turn."""
        try:
            before, after = self.render([_U]), self.render([_U], generation_prompt=True)
        except UserError:
            return ""
        return after.removeprefix(before) if after.startswith(before) else after.partition("qzuqz")[2]

    @cached_property
    def user_turn(self) -> tuple[str, str]:
        """What the template writes before the first user turn, and what marks its end: the special token right behind
        it, or else the first word there; "" for none."""
        opening, _, behind = self.render([_U], generation_prompt=True).partition("qzuqz")
        found = self._special.match(behind.lstrip())
        return opening, found.group() if found else next(iter(behind.split()), "")

    @cached_property
    def opens_thought(self) -> str:
        """The tag with which the generation prompt opens the model's reasoning (`<think>`); "" if it opens none."""
        return opened_by(self.generation_prompt)

    @cached_property
    def last_turn_frame(self) -> tuple[str, str]:
        """What the template itself writes around the last answer, after the generation prompt's own text: Qwen3's
        empty think block, gpt-oss' channel; and the token that ends it."""
        try:
            text = self.render([_U, _A])
            prompt = self.render([_U], generation_prompt=True)
        except UserError:
            return "", self.end_of_turn
        head = text.partition("qzaqz")[0]
        return (head.removeprefix(prompt) if head.startswith(prompt) else ""), self.end_of_turn

    @cached_property
    def keeps_space(self) -> dict[str, tuple[bool, bool]]:
        """Role -> whether blank text before and after its content is shown."""
        blank, found = "\n \n \n", {}
        for role in ("system", "developer", "user", "assistant", "tool"):
            spaced = Message(role=role, content=f"{blank}qzxqz{blank}")
            turns = {"assistant": [_U, spaced], "user": [spaced, _A]}.get(role, [spaced, _U, _A])
            try:
                before, _, after = self.render(turns).partition("qzxqz")
            except UserError:
                before = after = ""
            found[role] = (before.endswith(blank), after.startswith(blank))
        return found

    def find_special(self, text: str) -> list[tuple[int, int]]:
        """Character spans of the special tokens in `text`."""
        return [match.span() for match in self._special.finditer(text)]

    def disarm(self, value: Any) -> tuple[Any, bool]:
        """A message or a tool with the special tokens in its texts broken up, and whether there were any."""
        texts = [value["content"]] if len(value) == 2 and "content" in value else None
        if texts is not None and not self._special.search(texts[0]):
            return value, False
        safe = map_text(value, lambda text: disarm(text, self.special))
        return safe, safe != value

    def prepare(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """Messages as the template can show them, and whether a system prompt was put into a user turn."""
        taken = list(messages)
        if not self.takes_developer_or_none(taken):
            taken = [Message(**{**m, "role": "system"}) if m["role"] == "developer" else m for m in taken]
        if any("reasoning_content" in m for m in taken) and not self.shows_reasoning:
            taken = [_with_thought_in_content(m) for m in taken]
        systems = [i for i, m in enumerate(taken) if m["role"] == "system"]
        if not systems or (systems == [0] and self.takes_system) or self.takes_late_system:
            return taken, False
        return fold_system(taken, keep_first=self.takes_system), True

    def takes_developer_or_none(self, messages: Iterable[Message]) -> bool:
        return not any(m["role"] == "developer" for m in messages) or self.takes_developer


def _with_thought_in_content(message: Message) -> Message:
    thought = message.get("reasoning_content")
    if not thought:
        return message
    rest = {k: v for k, v in message.items() if k != "reasoning_content"}
    return Message(**{**rest, "content": f"<think>\n{thought.strip()}\n</think>\n\n{message['content']}"})  # type: ignore[typeddict-item]


def fold_system(messages: Sequence[Message], keep_first: bool = False) -> list[Message]:
    """System messages put into user turns, for templates that show none, or only the first.

    Each goes in front of the user turn that follows it, else behind the one before it; where there is neither, it
    becomes a user turn. keep_first: the system messages with which the conversation begins become one, and stay.
    """
    folded: list[Message] = []
    waiting: list[str] = []

    def settle() -> None:
        nonlocal waiting
        if not waiting:
            return
        text, waiting = "\n\n".join(waiting), []
        if folded and folded[-1]["role"] == "user":
            folded[-1] = Message(role="user", content=f"{folded[-1]['content']}\n\n{text}")
        else:
            folded.append(Message(role="user", content=text))

    for message in messages:
        if message["role"] == "system":
            if keep_first and not waiting and all(m["role"] == "system" for m in folded):
                text = message["content"]
                folded = [Message(role="system", content=f"{folded[0]['content']}\n\n{text}" if folded else text)]
            else:
                waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            folded.append(Message(role="user", content="\n\n".join([*waiting, message["content"]])))
            waiting = []
        else:
            settle()
            folded.append(message)
    settle()
    return folded


def disarm(text: str, special: Sequence[str]) -> str:
    """`text` with the tokenizer's special tokens broken up by a zero-width space.

    Data is hostile: a turn that contains "<|im_end|>" must not end itself and speak for another role.
    """
    for token in special:
        if token in text:
            text = text.replace(token, token[0] + _BREAK + token[1:])
    return text
