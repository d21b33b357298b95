"""Filling judge templates with hostile text so that it stays inside its place."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ema_scale.evaluation.judges.base import JudgeItem

_FIELD = re.compile(r"\{(question|answer|reasoning)\}")
# Tokens that chat templates are made of; an endpoint may read them as structure wherever they stand.
_CONTROL = re.compile(
    r"<\|(?=[^|>\n]{1,60}\|?>)|<(?=/?s>|/?bos>|/?eos>|pad>|unk>|(?:start|end)_of_turn>|<SYS>>|</SYS>>|/?think>"
    r"|(?:extra_id_|reserved_|unused)\d{1,5}>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|AVAILABLE_TOOLS|THINK|ARGS|CALL_ID)\])",
    re.I,
)
# A line that marks a place: words in brackets, such as [ANSWER START], <answer>, </answer>.
_MARK = re.compile(r"[\[<{(]+\s*/?\s*([A-Za-z][A-Za-z _-]{1,40}?)\s*[\]>})]+")
# What a reader, and a model, takes for another character.
_LOOKS_LIKE = str.maketrans(
    "АВЕЅІЈКМНОРСТУХѴаеорсухіјѕԁԛԝһ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧονακρ" + "ɑɡıꞮᴀᴇɴʀᴡ" + "∕⁄⧸∣ǀ│❘",
    "ABESIJKMHOPCTYXVaeopcyxijsdqwh" + "ABEZHIKMNOPTYXovakp" + "agiIaenrw" + "///||||",
)
_BRACKETS = {
    **dict.fromkeys("【〔〖〚⟦⟬❲⁅「『", "["),
    **dict.fromkeys("】〕〗〛⟧⟭❳⁆」』", "]"),
    **dict.fromkeys("〈《⟨⟪‹«❮❰❬˂ᐸ", "<"),
    **dict.fromkeys("〉》⟩⟫›»❯❱❭˃ᐳ", ">"),
}
# Letters that show nothing: Hangul fillers, and the like.
_UNSEEN = "\u115f\u1160\u3164\uffa0\u2800"
# Unicode's tag characters spell ASCII invisibly: instructions that no person reading the answer would see.
_INVISIBLE_ASCII = re.compile("[\U000e0000-\U000e007f]")


def fill_all(item: JudgeItem) -> dict[str, str]:
    """The item's judging prompts, filled with its texts."""
    values = {"question": item.question, "answer": item.answer, "reasoning": item.reasoning}
    return {name: fill(template, values) for name, template in item.prompts.items()}


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with {question}, {answer} and {reasoning} replaced once each place, never inside a value.

    A value cannot end its place early. Around each place stand marks of our own that hold a number made from all
    the values, so that no value can foresee it (it would have to contain its own hash):

        <<<answer 5d41402a
        ...
        answer 5d41402a>>>

    Where the template marks a place itself, by a bracketed line before it and one after it ([ANSWER START] ...
    [ANSWER END]), it stays as published, and what could pass for one of its marks is taken out of the value, also
    if it was written in look-alike or with invisible characters. Control tokens of chat templates are broken up.
    Other braces in the template stay as they are.
    """
    marks = _marks(template)
    number = hashlib.sha256("\0".join(f"{k}={v}" for k, v in sorted(values.items())).encode("utf-8", "replace"))
    nonce = number.hexdigest()[:8]
    parts, end = [], 0
    for match in _FIELD.finditer(template):
        value = _harmless(values.get(match[1], ""), marks)
        parts.append(template[end : match.start()])
        delimited = all(_MARK.fullmatch(line) for line in _neighbours(template, match))
        parts.append(value if delimited else f"<<<{match[1]} {nonce}\n{value}\n{match[1]} {nonce}>>>")
        end = match.end()
    return "".join(parts) + template[end:]


def _harmless(value: str, marks: list[re.Pattern[str]]) -> str:
    value = _INVISIBLE_ASCII.sub("", value).encode("utf-8", "replace").decode()  # a lone surrogate is no text
    value = _rewritten(value, marks, lambda found: "(mark removed)")
    return _rewritten(value, [_CONTROL], lambda found: f"{found} ")


def _rewritten(text: str, patterns: Sequence[re.Pattern[str]], by: Callable[[str], str]) -> str:
    """The text with what reads as one of the patterns rewritten; of matches that overlap, the first."""
    plain, places = _as_read(text)
    pieces, end = [], 0
    for first, last in sorted(match.span() for pattern in patterns for match in pattern.finditer(plain)):
        start, stop = places[first], places[last - 1] + 1
        if start >= end:
            pieces += [text[end:start], by(text[start:stop])]
        end = max(end, stop)
    return "".join([*pieces, text[end:]])


def _as_read(text: str) -> tuple[str, Sequence[int]]:
    """What a text reads as: look-alikes folded, what shows nothing left out; and where in it each character stands."""
    if text.isascii():
        return text, range(len(text))
    folded = [_folded(character) for character in text]
    return "".join(folded), [place for place, part in enumerate(folded) for _ in part]


@lru_cache(maxsize=1 << 16)
def _folded(character: str) -> str:
    if character in _UNSEEN:
        return ""
    parts = unicodedata.normalize("NFKD", _BRACKETS.get(character, character))
    return "".join(c for c in parts if unicodedata.category(c) not in ("Cf", "Mn", "Me")).translate(_LOOKS_LIKE)


def _marks(template: str) -> list[re.Pattern[str]]:
    """Patterns of what could pass for one of the template's marks, or of ours. Each is linear in the text."""
    patterns = []
    for match in _FIELD.finditer(template):
        for line in _neighbours(template, match):
            if mark := _MARK.fullmatch(line):
                words = r"[\s_-]*+".join(map(re.escape, re.split(r"[\s_-]+", mark[1])))
                # Square and angle brackets pass for each other; round ones and braces are ordinary text.
                left, right = re.escape("[<" + line[0]), re.escape("]>" + line[-1])
                patterns.append(rf"(?<![{left}])[{left}]++\s*+(?:/\s*+)?{words}\s*+[{right}]++")
                if line.startswith("<"):  # a tag may have attributes
                    patterns.append(rf"<\s*+(?:/\s*+)?{words}[\s/][^<>\n]{{0,80}}+>")
    ours = r"(?:question|answer|reasoning)\b(?:\s++[0-9a-f]{4,16}\b)?[^\w\s<>]{0,3}"
    patterns += [rf"<\s*+<\s*+<\s*+{ours}", rf"{ours}\s*+>\s*+>\s*+>"]
    return [re.compile(p, re.I) for p in patterns]


def _neighbours(template: str, match: re.Match[str]) -> tuple[str, str]:
    """The lines directly above and below a place that has a line of its own; '' for one that is not there."""
    before, after = template[: match.start()].rstrip(" \t"), template[match.end() :].lstrip(" \t")
    above = before[:-1].rsplit("\n", 1)[-1].strip() if before.endswith("\n") else ""
    below = after[1:].split("\n", 1)[0].strip() if after.startswith("\n") else ""
    return above, below
