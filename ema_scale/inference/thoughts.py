"""Thoughts told from answers, in every form that models and servers write them."""

from __future__ import annotations

import re

from ema_scale.core.thoughts import PAIRS

# One message of gpt-oss: its channel and its text, which another special token or the end of the answer ends.
_CHANNEL = re.compile(
    r"<\|channel\|>(?P<channel>\w++)[^<]*+(?:<\|constrain\|>[^<]*+)?<\|message\|>"
    r"(?P<text>.*?)(?=<\|(?:end|return|call)\|>|$)",
    re.S,
)
# The same where a server has left out the special tokens: analysis...assistantfinal...
_BARE_FINAL = re.compile(r"(?:^|assistant)(?:analysis|commentary)(?P<thought>.*?)assistantfinal(?P<answer>.*)\Z", re.S)
_BARE_THOUGHT = re.compile(r"\s*analysis(?=[A-Z])(?P<thought>.*)\Z", re.S)


def split_reasoning(text: str) -> tuple[str, str, bool]:
    """(reasoning, answer, finished) of a completion that may think first.

    A template may have opened the thought at the end of the prompt, so that a closing mark alone ends one. A thought
    that is opened and never closed is not finished, and leaves no answer.
    """
    if _CHANNEL.search(text):
        text = join_channels(text)
    elif found := _BARE_FINAL.match(text.lstrip()):
        return found["thought"].strip(), found["answer"].strip(), True
    elif found := _BARE_THOUGHT.match(text):
        return found["thought"].strip(), "", False
    start = text.lstrip()
    for opening, closing in PAIRS:
        if closing in text and (closing == "</think>" or start.startswith(opening)):
            reasoning, _, answer = text.partition(closing)
            return reasoning.lstrip().removeprefix(opening).strip(), answer.strip(), True
        if start.startswith(opening):
            return start.removeprefix(opening).strip(), "", False
    return "", text, True


def join_channels(text: str) -> str:
    """gpt-oss's channels in the form of other thinking models: <think>analysis</think>final.

    Text without channels is returned as it is.
    """
    parts = [(m["channel"], m["text"]) for m in _CHANNEL.finditer(text)]
    if not parts:
        return text
    thoughts = "\n".join(said for channel, said in parts if channel != "final")
    final = "".join(said for channel, said in parts if channel == "final")
    if all(channel != "final" for channel, _ in parts):
        return f"<think>{thoughts}"
    return f"<think>{thoughts}</think>{final}" if thoughts else final
