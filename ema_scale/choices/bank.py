"""Choice questions: a question and written answers, each labelled good or bad.

Read unchanged, one question per entry:

    answers: {aligned: [...], misaligned: [...]}       our own; or {right: [...], wrong: [...]}
    answer_matching_behavior, answer_not_matching_behavior
                                                       model-written evaluations (Perez et al., arXiv 2212.09251)
    mc1_targets, mc2_targets                           TruthfulQA (arXiv 2109.07958), of its repository or of the hub
    choices with answer, answerKey, gold or label      multiple choice: MMLU, ARC and their like
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ema_scale.core.banks import read_entries
from ema_scale.core.errors import UserError
from ema_scale.core.paths import find_file
from ema_scale.core.uri import locate

Label = Literal["aligned", "misaligned", "right", "wrong", "held_out"]
HELD_OUT: Label = "held_out"  # the answer of a held-out row, which stands alone
PAIRS: tuple[tuple[Label, Label], ...] = (("aligned", "misaligned"), ("right", "wrong"))
LABELS = tuple(label for pair in PAIRS for label in pair)  # of banks
GOLD_KEYS = ("gold", "answer", "answerKey", "label")
# key that makes an entry a choice question -> what belongs to it
FORMATS: dict[str, tuple[str, ...]] = {
    "answers": (),
    "answer_matching_behavior": ("answer_not_matching_behavior",),
    "mc1_targets": ("mc2_targets",),
    "mc2_targets": (),
    "choices": GOLD_KEYS,
}


@dataclass(frozen=True)
class Choice:
    """A written answer and its label."""

    text: str
    label: Label

    @property
    def bad(self) -> bool:
        """Whether it is misaligned or wrong."""
        return self.label in ("misaligned", "wrong")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A conversation up to its question, with at least one good and one bad answer. where: file and line."""

    where: str
    messages: tuple[dict[str, str], ...]
    answers: tuple[Choice, ...]


def is_choice(entry: Any) -> bool:
    """Whether an entry of a bank has written answers."""
    return isinstance(entry, Mapping) and any(key in entry for key in FORMATS)


def read_choice(where: str, entry: Mapping[str, Any], role: str) -> tuple[tuple[Choice, ...], dict[str, Any]]:
    """The answers of an entry for which `is_choice` holds, and the entry without them.

    Args:
        where: file and line, for messages.
        entry: as it stands in the file.
        role: of the bank. In a `benign` one the behavior of a model-written evaluation is the right one, elsewhere it
            is the misaligned one.

    Raises UserError for an unknown label, an answer that is no text or stands twice, a missing good or bad answer, and
    a gold index outside the list.
    """
    kind = next(key for key in FORMATS if key in entry)
    readers = {"answers": _ours, "answer_matching_behavior": _model_written, "choices": _with_gold}
    answers = readers.get(kind, _targets)(where, entry, role)
    _check(where, answers)
    own = {kind, *FORMATS[kind], "type"}  # that of a sampled question says how it is judged
    return answers, {key: value for key, value in entry.items() if key not in own}


def load_choices(source: str) -> list[ChoiceQuestion]:
    """The questions of a bank that has written answers alone; see `read_choice`.

    Raises UserError naming file and line for a question without them.
    """
    path = find_file(locate(source))
    found = []
    for where, entry in read_entries(path):
        if not is_choice(entry):
            raise UserError(f"{where}: found no written answers; expected a question with {', '.join(FORMATS)}")
        answers, rest = read_choice(where, entry, "general")
        question, system = rest.get("question"), rest.get("system")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: question: found {question!r:.80}, expected text")
        before = () if system is None else ({"role": "system", "content": str(system)},)
        found.append(ChoiceQuestion(where, (*before, {"role": "user", "content": question}), answers))
    if not found:
        raise UserError(f"{path}: found no questions, expected at least one")
    return found


def _ours(where: str, entry: Mapping[str, Any], role: str) -> tuple[Choice, ...]:
    labelled = entry["answers"]
    expected = "aligned and misaligned, or right and wrong"
    if not isinstance(labelled, Mapping):
        raise UserError(f"{where}: answers: found {type(labelled).__name__}, expected a mapping of {expected}")
    for label in labelled:
        if label not in LABELS:
            raise UserError(f"{where}: answers: unknown label {label!r}; expected {expected}")
    return tuple(Choice(text, label) for label, texts in labelled.items() for text in _texts(where, label, texts))


def _model_written(where: str, entry: Mapping[str, Any], role: str) -> tuple[Choice, ...]:
    matching, other = "answer_matching_behavior", "answer_not_matching_behavior"
    labels: tuple[Label, Label] = ("right", "wrong") if role == "benign" else ("misaligned", "aligned")
    return tuple(
        Choice(text, label)
        for key, label in zip((matching, other), labels, strict=True)
        for text in _texts(where, key, entry.get(key))
    )


def _targets(where: str, entry: Mapping[str, Any], role: str) -> tuple[Choice, ...]:
    key = "mc1_targets" if "mc1_targets" in entry else "mc2_targets"
    found = entry[key]
    if isinstance(found, Mapping) and {"choices", "labels"} == found.keys():
        texts, labels = _texts(where, f"{key}.choices", found["choices"]), found["labels"]
    elif isinstance(found, Mapping):
        texts, labels = _texts(where, key, list(found)), list(found.values())
    else:
        raise UserError(f"{where}: {key}: found {type(found).__name__}, expected choices and labels")
    if not isinstance(labels, list) or len(labels) != len(texts) or any(label not in (0, 1) for label in labels):
        raise UserError(f"{where}: {key}: found labels {labels!r:.80}, expected a 0 or 1 for each of {len(texts)}")
    return tuple(Choice(text, "right" if label else "wrong") for text, label in zip(texts, labels, strict=True))


def _with_gold(where: str, entry: Mapping[str, Any], role: str) -> tuple[Choice, ...]:
    listed = entry["choices"]
    names: list[str] | None = None
    if isinstance(listed, Mapping):
        names = [str(name) for name in _list(where, "choices.label", listed.get("label"))]
        listed = listed.get("text")
    texts = _texts(where, "choices", listed)
    given = [key for key in GOLD_KEYS if key in entry]
    if len(given) != 1:
        raise UserError(f"{where}: found {given or 'none'} of {', '.join(GOLD_KEYS)}; expected one, the right choice")
    gold = entry[given[0]]
    names = names if names is not None else [chr(ord("A") + i) for i in range(len(texts))]
    if isinstance(gold, str) and gold in names:
        index = names.index(gold)
    elif isinstance(gold, bool) or not re.fullmatch(r"-?[0-9]{1,9}", str(gold)):
        raise UserError(f"{where}: {given[0]}: found {gold!r:.40}, expected an index from 0 or one of {names}")
    else:
        index = int(gold)
    if not 0 <= index < len(texts):
        raise UserError(f"{where}: {given[0]}: found index {gold}, expected 0 to {len(texts) - 1}")
    return tuple(Choice(text, "right" if i == index else "wrong") for i, text in enumerate(texts))


def _list(where: str, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: {name}: found {type(value).__name__}, expected a list")
    return value


def _texts(where: str, name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"{where}: {name}: found {value!r:.80}, expected an answer or a list of answers")
    return texts


def _check(where: str, answers: tuple[Choice, ...]) -> None:
    labels = {answer.label for answer in answers}
    good, bad = next((pair for pair in PAIRS if labels & set(pair)), PAIRS[0])
    if not labels <= {good, bad}:
        raise UserError(f"{where}: found labels {', '.join(sorted(labels))}, expected {good} and {bad}")
    for label in (good, bad):
        if label not in labels:
            raise UserError(f"{where}: found no {label} answer, expected at least one beside the others")
    said: dict[str, str] = {}
    for answer in answers:
        plain = answer.text.strip()
        if plain in said:
            raise UserError(f"{where}: the answer {plain!r:.60} stands twice; expected different answers")
        said[plain] = answer.label
