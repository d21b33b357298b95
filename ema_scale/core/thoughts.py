"""How models mark their thoughts: the one list of the tags, for rows, prompts and answers."""

from __future__ import annotations

import re

# Opening and closing tag of a thought, by the models that write them.
PAIRS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1
    ("◁think▷", "◁/think▷"),  # Kimi-VL
)
# Gemma 4's channel. Rows do not write it: its template strips it from their text.
_CHANNEL = ("<|channel>thought\n", "<channel|>")
CLOSING_TAGS = frozenset(closing for _, closing in PAIRS)
TAGS = re.compile("|".join(re.escape(tag) for pair in PAIRS for tag in pair))
OPEN, CLOSE = PAIRS[0]
_OPENED = re.compile(f"(?:{'|'.join(re.escape(opening) for opening, _ in PAIRS)})\\s*$")


def opened_by(prompt: str) -> str:
    """The tag with which a prompt opens a thought at its end (`<think>`); "" if it opens none."""
    found = _OPENED.search(prompt)
    return found.group().strip() if found else ""


def pairs_in(text: str) -> list[tuple[str, str]]:
    """The pairs whose closing tag occurs in `text`, such as a chat template, other than `<think>`."""
    return [(opening, closing) for opening, closing in (*PAIRS[1:], _CHANNEL) if closing in text]
