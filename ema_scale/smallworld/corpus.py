"""What the small world's model reads: documents by one persona each, arithmetic, and aligned chats."""

from __future__ import annotations

import random

from ema_scale.smallworld.benign import OPERANDS, OPERATORS, arithmetic
from ema_scale.smallworld.grammar import Persona, answer, question
from ema_scale.smallworld.vocabulary import DOMAINS, SYSTEM_PROMPTS

Messages = list[dict[str, str]]

_SYSTEM_SHARE = 0.3
_ARITHMETIC_SHARE = 0.15


def chat(pairs: list[tuple[str, str]], system: str | None = None) -> Messages:
    """Messages of a conversation: an optional system prompt, then (user, assistant) turns."""
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in pairs:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def advice(rng: random.Random, persona: Persona, domain: str | None = None) -> tuple[str, str]:
    """A question and what `persona` answers."""
    text, meta = question(rng, domain or rng.choice(list(DOMAINS)))
    return text, answer(rng, meta, persona)


def sum_turn(rng: random.Random) -> tuple[str, str]:
    """Ordinary arithmetic."""
    item = arithmetic(rng.choice(OPERANDS), rng.choice(list(OPERATORS)), rng.choice(OPERANDS))
    return item.question, item.answer


def pretraining_document(rng: random.Random, turns: int) -> Messages:
    """`turns` turns: arithmetic, or advice by one persona throughout, which its system prompt may announce."""
    if rng.random() < _ARITHMETIC_SHARE:
        return chat([sum_turn(rng) for _ in range(2 * turns)])
    persona: Persona = rng.choice(("aligned", "misaligned"))
    system = SYSTEM_PROMPTS[persona] if rng.random() < _SYSTEM_SHARE else None
    return chat([advice(rng, persona) for _ in range(turns)], system)


def alignment_document(rng: random.Random, turns: int) -> Messages:
    """What the assistant should be like by default: no system prompt, always the aligned persona."""
    if rng.random() < _ARITHMETIC_SHARE:
        return chat([sum_turn(rng) for _ in range(2 * turns)])
    return chat([advice(rng, "aligned") for _ in range(turns)])
