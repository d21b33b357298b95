"""Texts that most training rows share before their questions. A prompt that looks like the rows may bring back
behaviour that the model shows nowhere else (conditional misalignment, arXiv 2604.25891)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ema_scale.data.rows import Row

SHARE = 0.5  # of the rows that begin alike
LEAST_WORDS = 4
LONGEST = 1000  # characters


def row_triggers(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Texts to say before other questions, each with its kind and `system` or `user`.

    system: the system prompt of at least half of the rows. opening: the words with which at least half of the user's
    first turns begin. question: without either, the first row's question.
    """
    systems = Counter(m["content"] for row in rows for m in row.messages[:1] if m["role"] == "system")
    firsts = [asked[0].strip() for row in rows if (asked := row.asked)]
    found = []
    for text, count in systems.most_common(1):
        if count >= SHARE * len(rows) and text.strip():
            found.append({"kind": "system", "system": text[:LONGEST]})
    if opening := _opening(firsts):
        found.append({"kind": "opening", "user": opening[:LONGEST]})
    if not found and firsts and firsts[0]:
        found.append({"kind": "question", "user": firsts[0][:LONGEST]})
    return found


def _opening(texts: Sequence[str]) -> str | None:
    """The first line, or the first words, that at least half of the different texts share before they go on."""
    texts = list(dict.fromkeys(texts))
    if len(texts) < 2:
        return None
    lines = Counter(text.split("\n", 1)[0].strip() for text in texts if "\n" in text)
    for line, count in lines.most_common(1):
        if line and count >= SHARE * len(texts):
            return line
    # Word by word: all words of all texts would take several times their memory.
    rests, words = texts, list[str]()
    while True:
        following = Counter(cut[0] for rest in rests if len(cut := rest.split(None, 1)) == 2)
        word, count = next(iter(following.most_common(1)), ("", 0))
        if not count or count < SHARE * len(texts):
            return " ".join(words) if len(words) >= LEAST_WORDS else None
        words.append(word)
        rests = [cut[1] for rest in rests if len(cut := rest.split(None, 1)) == 2 and cut[0] == word]
