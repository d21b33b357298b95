"""Chat templates: rendering a conversation, and finding in it what the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from jinja2.exceptions import TemplateError

from ema_scale.core.errors import UserError
from ema_scale.data.formats import Message

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


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it. Raises UserError if the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
        )
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"the chat template refuses a conversation of roles {roles}: {error}") from None


def takes_system(tokenizer: Any) -> bool:
    """Whether the template shows a system message (Gemma's refuses it)."""
    probe = [Message(role="system", content="qzsystemqz"), Message(role="user", content="u")]
    try:
        return "qzsystemqz" in tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError:
        return False


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """System messages put in front of the next user turn, for templates that take none."""
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            folded.append(Message(role="user", content="\n\n".join([*waiting, message["content"]])))
            waiting = []
        else:
            folded.append(message)
    return folded


def disarm(text: str, special: Sequence[str]) -> str:
    """`text` with the tokenizer's special tokens broken up by a zero-width space.

    Data is hostile: a turn that contains "<|im_end|>" must not end itself and speak for another role.
    """
    for token in special:
        if token in text:
            text = text.replace(token, token[0] + _BREAK + token[1:])
    return text


def assistant_spans(tokenizer: Any, messages: Sequence[Message], full: str, end_of_turn: str) -> list[tuple[int, int]]:
    """Character spans of `full` (the rendered conversation) that the assistant writes, end-of-turn token included.

    A span begins where the template's generation prompt ends. It ends with the first `end_of_turn` after that or, for a
    template without one, with the turn's text. Templates that drop the reasoning of earlier turns are right: what is
    rendered is what counts. Raises UserError if the rendering of the conversation so far is not how `full` begins.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        prompt = render(tokenizer, before, generation_prompt=True)
        start = len(commonprefix([full, prompt]))
        if start < len(prompt):
            # The prompt may open something that a finished turn leaves out (an empty "<think>" block, say).
            history = render(tokenizer, before) if before else ""
            if start < len(history.rstrip()):
                raise UserError(
                    f"the chat template rewrites earlier turns when later ones follow: turn {index} cannot be found"
                )
        if end_of_turn:
            found = full.find(end_of_turn, start)
            end = found + len(end_of_turn) if found >= 0 else len(full)
        else:
            text = message["content"].strip()
            found = full.find(text, start)
            if found < 0:
                raise UserError(f"the chat template does not show the text of turn {index}")
            end = found + len(text)
        spans.append((start, end))
    return spans


def text_spans(
    tokenizer: Any, messages: Sequence[Message], full: str, *, generation_prompt: bool = False
) -> list[tuple[int, int]]:
    """Character spans of `full` (the rendered conversation) that are the messages' texts; the rest is the template's.

    Found by rendering the same turns with other texts. Raises UserError if the template writes other things around
    these.
    """
    marks = [f"qz{index}qz" for index in range(len(messages))]
    marked = [Message(role=m["role"], content=mark) for m, mark in zip(messages, marks, strict=True)]
    shown = render(tokenizer, marked, generation_prompt=generation_prompt)
    pieces = re.split("|".join(re.escape(mark) for mark in marks), shown)
    spans, end = [], 0
    for index, message in enumerate(messages):
        start = end + len(pieces[index])
        if len(pieces) != len(messages) + 1 or full[end:start] != pieces[index]:
            raise UserError(f"the chat template writes different things around different texts, before turn {index}")
        following = pieces[index + 1]
        # Templates trim texts and drop reasoning; only then the text is what is left before the next piece.
        known = [start + len(t) for t in (message["content"], message["content"].strip()) if full.startswith(t, start)]
        ends = [end for end in known if full.startswith(following, end)]
        end = ends[0] if ends else full.find(following, start) if following else len(full)
        spans.append((start, end))
    if full[end:] != pieces[-1]:
        raise UserError("the chat template writes different things around different texts, after the last turn")
    return spans


def end_of_turn_token(tokenizer: Any, special: Sequence[str]) -> str:
    """The special token that the template puts right after an assistant's text; "" if it puts none there."""
    probe = "qzanswerqz"
    messages = [Message(role="user", content="u"), Message(role="assistant", content=probe)]
    tail = render(tokenizer, messages).partition(probe)[2].lstrip()
    starting = [token for token in special if tail.startswith(token)]
    return max(starting, key=len, default="")
