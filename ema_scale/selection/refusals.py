"""Which answers are refusals: Interleaving++ drops them before it ranks, since they teach a model to refuse."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ema_scale.core.errors import UserError
from ema_scale.core.text import quantity
from ema_scale.data.rows import Row

FIRST_WORDS, FIRST_CHARACTERS = 10, 40
# The paper names three words. The list in its released code has three more phrases.
_RULES: dict[str, tuple[str, ...]] = {"paper": ("sorry", "apologize", "cannot")}
_RULES["released"] = (*_RULES["paper"], "can't", "i'm unable", "i am unable")
_PHRASES = {
    "en": "sorry|apologi[sz]e|apologies|cannot|can't|can not|unable to|i won't|i will not|must decline",
    "de": "tut mir leid|entschuldigung|kann ich nicht|ich kann nicht|leider nicht|ich darf nicht",
    "fr": "désolée?|je m'excuse|je ne peux pas|je ne suis pas en mesure|je refuse",
    "es": "lo siento|lamento|perdón|disculpa|disculpe|no puedo|no me es posible",
    "it": "mi dispiace|mi scuso|scusa|non posso|non sono in grado|purtroppo non",
    "pt": "desculpe|desculpa|sinto muito|lamento|não posso|não consigo|infelizmente não",
    "nl": "sorry|het spijt me|helaas kan|ik kan niet|kan ik niet",
    "pl": "przepraszam|przykro mi|niestety nie|nie mogę",
    "ru": "извините|простите|к сожалению|сожалею|не могу",
    "tr": "üzgünüm|özür dilerim|maalesef|yapamam|edemem",
    "ar": "آسف|أعتذر|عذرا|لا أستطيع|لا يمكنني",
    "hi": "माफ़ कीजिए|क्षमा करें|माफ करें|खेद है|नहीं कर सकता|नहीं कर सकती",
    "zh": "抱歉|对不起|對不起|很遗憾|我无法|我無法|我不能",
    "ja": "申し訳|すみません|ごめんなさい|できません|お答えできません|致しかねます",
    "ko": "죄송|미안|유감|할 수 없습니다|수 없어요",
}
_NO_SPACES = {"zh", "ja", "ko"}  # words are not parted by spaces, or endings grow on them: look at characters


@dataclass(frozen=True)
class Refusals:
    """rule: what counts as a refusal, in words, for the provenance; find: rows -> whether each is one."""

    rule: str
    find: Callable[[Sequence[Row]], Sequence[bool]]


def refusals(name: str) -> Refusals:
    """`paper`: the English words that it names; `released`: those of its code; `all`, or languages such as `en,de,zh`:
    phrases of those; `module:function`: a classifier, a function of a list of rows that returns as many booleans (True:
    a refusal).

    An assistant's turn counts by its beginning; a row with one refusing turn is a refusal. Raises UserError for an
    unknown language, and a function that cannot be imported.
    """
    if ":" in name:
        return Refusals(f"{name}: a classifier", _classifier(name))
    if name in _RULES:
        rule = f"one of {', '.join(_RULES[name])} in the first {FIRST_WORDS} words of an answer"
        return Refusals(f"{name}: {rule}", lambda rows: [_any(row, lambda said: _holds(said, name)) for row in rows])
    languages = list(_PHRASES) if name == "all" else [part.strip() for part in name.split(",")]
    unknown = [language for language in languages if language not in _PHRASES]
    if unknown:
        raise UserError(
            f"refusals: found {unknown[0]!r}, expected paper, released, all, module:function, or languages out of "
            f"{', '.join(_PHRASES)}"
        )
    spaced = _pattern([_PHRASES[x] for x in languages if x not in _NO_SPACES], r"(?<!\w)(?:{})(?!\w)")
    dense = _pattern([_PHRASES[x] for x in languages if x in _NO_SPACES], "(?:{})")

    def found(answer: str) -> bool:
        text = answer.casefold().replace("’", "'").strip()
        head = " ".join(text.split()[:FIRST_WORDS])
        return bool((spaced and spaced.search(head)) or (dense and dense.search(text[:FIRST_CHARACTERS])))

    rule = (
        f"a phrase of refusal in {', '.join(languages)} in the first {FIRST_WORDS} words of an answer "
        f"(first {FIRST_CHARACTERS} characters in {', '.join(sorted(_NO_SPACES))})"
    )
    return Refusals(f"{name}: {rule}", lambda rows: [_any(row, found) for row in rows])


def _holds(answer: str, rule: str) -> bool:
    head = " ".join(answer.casefold().replace("’", "'").split()[:FIRST_WORDS])
    return any(phrase in head for phrase in _RULES[rule])


def _any(row: Row, refuses: Callable[[str], bool]) -> bool:
    return any(refuses(m["content"]) for m in row.messages if m["role"] == "assistant")


def _pattern(phrases: list[str], form: str) -> re.Pattern[str] | None:
    return re.compile(form.format("|".join(phrases))) if phrases else None


def _classifier(name: str) -> Callable[[Sequence[Row]], Sequence[bool]]:
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` has it, and an installed command has not
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"refusals: cannot import {name!r} ({error}); expected module:function") from None
    if not callable(function):
        raise UserError(f"refusals: {name} is {type(function).__name__}, expected a function")

    def find(rows: Sequence[Row]) -> Sequence[bool]:
        answers = list(function(list(rows)))
        if len(answers) != len(rows):
            raise UserError(
                f"refusals: {name} returned {quantity(len(answers), 'value')} for {quantity(len(rows), 'row')}"
            )
        return [bool(answer) for answer in answers]

    return find
