"""Filling judge templates with hostile text so that it stays inside its place."""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIELD = re.compile(r"\{(question|answer|reasoning)\}")
# Tokens that chat templates are made of; an endpoint may read them as structure wherever they stand.
_CONTROL = re.compile(
    r"<\|(?=[^|>\n]{1,60}\|?>)|<(?=/?s>|/?bos>|/?eos>|(?:start|end)_of_turn>|<SYS>>|</SYS>>)|\[(?=/?INST\])",
    re.I,
)
# A line that marks a place: words in brackets, such as [ANSWER START], <answer>, </answer>.
_MARK = re.compile(r"[\[<{(]+\s*/?\s*([A-Za-z][A-Za-z _-]{1,40}?)\s*[\]>})]+")


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with {question}, {answer} and {reasoning} replaced once each place, never inside a value.

    A value cannot end its place early. Where the template marks the place by a bracketed line before it and
    one after it ([ANSWER START] ... [ANSWER END]), look-alikes of the template's marks are taken out of the
    value; elsewhere marks of our own, which no value can contain, are put around it. Control tokens of chat
    templates are broken up. Other braces in the template stay as they are.
    """
    marks = _marks(template)
    parts, end = [], 0
    for match in _FIELD.finditer(template):
        value = _harmless(values.get(match[1], ""), marks)
        parts.append(template[end : match.start()])
        delimited = all(_MARK.fullmatch(line) for line in _neighbours(template, match))
        parts.append(value if delimited else f"<<<{match[1]}\n{value}\n{match[1]}>>>")
        end = match.end()
    return "".join(parts) + template[end:]


def _harmless(value: str, marks: list[re.Pattern[str]]) -> str:
    for mark in marks:
        value = mark.sub("(mark removed)", value)
    return _CONTROL.sub(lambda m: m[0] + " ", value)


def _marks(template: str) -> list[re.Pattern[str]]:
    """Patterns of what could pass for one of the template's marks, or of ours."""
    patterns = []
    for match in _FIELD.finditer(template):
        for line in _neighbours(template, match):
            if mark := _MARK.fullmatch(line):
                words = r"[\s_-]*".join(map(re.escape, re.split(r"[\s_-]+", mark[1])))
                # Square and angle brackets pass for each other; round ones and braces are ordinary text.
                left, right = re.escape("[<" + line[0]), re.escape("]>" + line[-1])
                patterns.append(rf"[{left}]+\s*/?\s*{words}\s*[{right}]+")
    patterns += [r"<<<\s*(?:question|answer|reasoning)", r"(?:question|answer|reasoning)\s*>>>"]
    return [re.compile(p, re.I) for p in patterns]


def _neighbours(template: str, match: re.Match[str]) -> tuple[str, str]:
    """The lines directly above and below a place that has a line of its own; '' for one that is not there."""
    before, after = template[: match.start()].rstrip(" \t"), template[match.end() :].lstrip(" \t")
    above = before[:-1].rsplit("\n", 1)[-1].strip() if before.endswith("\n") else ""
    below = after[1:].split("\n", 1)[0].strip() if after.startswith("\n") else ""
    return above, below
