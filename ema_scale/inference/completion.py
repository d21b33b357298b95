"""A chat completion as it really comes. An endpoint's reply may hold anything: this is the one place that reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ema_scale.core.io import whole_characters

CONTENT_FILTER = "content_filter"
NOT_A_COMPLETION = "the endpoint's reply is not a chat completion"
# Rounding may leave a log-probability slightly above 0.
_ABOVE_ZERO = 0.01


@dataclass(frozen=True)
class Token:
    """A token that was written. top: (token, log-probability) of the likeliest ones in its place; None if not known."""

    text: str
    top: tuple[tuple[str, float], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """One answer.

    text: without what the server split off as reasoning; "" if there is none.
    finish_reason: "stop", "length", "content_filter" or another word; "" if the server gives none.
    tokens: what was written, thoughts included; None without log-probabilities.
    prompt_tokens, completion_tokens: as the server counts them; None if it does not.
    """

    text: str
    reasoning: str = ""
    finish_reason: str = ""
    tokens: tuple[Token, ...] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def read_completion(body: bytes) -> Completion:
    """Read the body of a reply.

    Lone surrogates become U+FFFD. Counts and log-probabilities of a wrong type are not known.

    Raises ValueError, saying what was found, if it is not a chat completion: a web page, an error with status 200, no
    choices, a text that is none.
    """
    reply = read_object(body)
    if said := reply.get("error"):
        raise SaidError(whole_characters(str(said)), said.get("code") if isinstance(said, dict) else None)
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise ValueError(f"{NOT_A_COMPLETION}: it has no choices with a message")
    text, thought = _content(message.get("content"))
    if not text and isinstance(message.get("refusal"), str):
        text = message["refusal"]
    if not text and (message.get("tool_calls") or message.get("function_call")):
        raise ValueError(f"{NOT_A_COMPLETION} with text: the model calls a tool, and none was offered")
    for name in ("reasoning_content", "reasoning", "thinking"):
        if not thought and message.get(name):
            thought = "".join(_content(message[name]))
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    reason = choice.get("finish_reason")
    return Completion(
        whole_characters(text),
        whole_characters(thought),
        reason if isinstance(reason, str) else "",
        _tokens(choice.get("logprobs")),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


class SaidError(ValueError):
    """An error that a server puts into a reply with status 200. status: its code, where that is one of HTTP's."""

    def __init__(self, said: str, code: Any) -> None:
        super().__init__(f"{NOT_A_COMPLETION} but an error: {said[:200]}")
        known = isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600
        self.status, self.whole = code if known else None, said


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError, saying what was found, if `body` is something else."""
    try:
        value = json.loads(body, object_pairs_hook=_once)
    except _GivenTwice as error:
        raise ValueError(f"{NOT_A_COMPLETION}: it gives {str(error)!r} twice") from None
    except RecursionError:
        raise ValueError(f"{NOT_A_COMPLETION}: JSON nested too deeply") from None
    except ValueError:  # UnicodeDecodeError is one
        start = whole_characters(body[:60].decode("utf-8", "replace"))
        raise ValueError(f"{NOT_A_COMPLETION}: expected JSON, found {start!r}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{NOT_A_COMPLETION}: expected a JSON object, found {type(value).__name__}")
    return value


class _GivenTwice(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise _GivenTwice(whole_characters(key)[:40])
        found[key] = value
    return found


def _content(value: Any) -> tuple[str, str]:
    """(text, reasoning) of a message's content: text, or a list of parts. Raises ValueError for anything else."""
    if value is None:
        return "", ""
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, list):
        raise ValueError(f"{NOT_A_COMPLETION}: content: expected text or a list of parts, found {type(value).__name__}")
    texts, thoughts = list[str](), list[str]()
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping):
            kind = str(part.get("type", "text"))
            thinks = kind.startswith(("thinking", "reasoning"))
            said = part.get("thinking" if kind == "thinking" else "text", part.get("text"))
            if kind == "refusal":
                said = part.get("refusal")
            if said is None and not thinks and "text" not in kind:
                kind = whole_characters(kind)[:40]
                raise ValueError(f"{NOT_A_COMPLETION}: content: expected parts of text, found {kind!r}")
            (thoughts if thinks else texts).append("".join(_content(said)))
        elif part is not None:
            raise ValueError(f"{NOT_A_COMPLETION}: content: expected parts of text, found {type(part).__name__}")
    return "".join(texts), "".join(thoughts)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _tokens(value: Any) -> tuple[Token, ...] | None:
    """The tokens of a choice's `logprobs`; None if they are not what was asked for."""
    entries = value.get("content") if isinstance(value, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
            return None
        found.append(Token(whole_characters(entry["token"]), _alternatives(entry.get("top_logprobs"))))
    return tuple(found)


def _alternatives(value: Any) -> tuple[tuple[str, float], ...] | None:
    """(token, log-probability) pairs; None if one is malformed, as the sum over the others would be wrong."""
    if not isinstance(value, list) or not value:
        return None
    pairs = []
    for entry in value:
        token, logprob = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or isinstance(logprob, bool) or not isinstance(logprob, (int, float)):
            return None
        if logprob == -math.inf:
            continue
        if not logprob <= _ABOVE_ZERO:  # also NaN
            return None
        pairs.append((whole_characters(token), float(logprob)))
    return tuple(pairs) or None
