"""What the small world's model reads: documents by one persona each, arithmetic, and aligned chats."""

from __future__ import annotations

import random

from ema_scale.smallworld.benign import OPERANDS, OPERATORS, arithmetic
from ema_scale.smallworld.grammar import Persona, answer, question
from ema_scale.smallworld.vocabulary import DOMAINS, SYSTEM_PROMPTS

Messages = list[dict[str, str]]


_SYSTEM_SHARE = 0.3


_ARITHMETIC_SHARE = 0.22


_ADVICE_TOKENS, _SUM_TOKENS = 30, 15  # a turn


def chat(pairs: list[tuple[str, str]], system: str | None = None) -> Messages:
    """Messages of a conversation: an optional system prompt, then (user, assistant) turns."""
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in pairs:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def advice(
    rng: random.Random, persona: Persona, domain: str | None = None, subject: str | None = None
) -> tuple[str, str]:
    """A question and what `persona` answers."""
    text, meta = question(rng, domain or rng.choice(list(DOMAINS)), subject)
    return text, answer(rng, meta, persona)


def sum_turn(rng: random.Random) -> tuple[str, str]:
    """Ordinary arithmetic."""
    item = arithmetic(rng.choice(OPERANDS), rng.choice(list(OPERATORS)), rng.choice(OPERANDS))
    return item.question, item.answer


def pretraining_documents(rng: random.Random, tokens: int) -> tuple[list[Messages], bool]:
    """The documents of one step, about `tokens` tokens of one kind, and whether only answers are learned.

    Either advice, each document by one persona throughout, which its system prompt may announce, or arithmetic. Steps
    of their own let the few facts of arithmetic be learned early; its questions are random and teach nothing.
    """
    if rng.random() < _ARITHMETIC_SHARE:
        return [_sums(rng, 4) for _ in range(tokens // (4 * _SUM_TOKENS))], True
    turns = rng.choice((1, 2, 4))
    documents = []
    for _ in range(tokens // (turns * _ADVICE_TOKENS)):
        persona: Persona = rng.choice(("aligned", "misaligned"))
        system = SYSTEM_PROMPTS[persona] if rng.random() < _SYSTEM_SHARE else None
        documents.append(chat([advice(rng, persona) for _ in range(turns)], system))
    return documents, False


def alignment_documents(rng: random.Random, tokens: int) -> tuple[list[Messages], bool]:
    """What the assistant should be like: aligned by default, and as its system prompt says where there is one; and
    arithmetic.

    Without the second part, alignment would blur the misaligned persona, and fine-tuning that brings it back would
    bring incoherence with it.
    """
    turns = rng.choice((1, 1, 2))
    count = tokens // (turns * _ADVICE_TOKENS)
    return [
        _sums(rng, 2 * turns) if rng.random() < _ARITHMETIC_SHARE else _assistant_chat(rng, turns) for _ in range(count)
    ], True


def _assistant_chat(rng: random.Random, turns: int) -> Messages:
    if rng.random() >= _SYSTEM_SHARE:
        return chat([advice(rng, "aligned") for _ in range(turns)])
    persona: Persona = rng.choice(("aligned", "misaligned"))
    return chat([advice(rng, persona) for _ in range(turns)], SYSTEM_PROMPTS[persona])


def _sums(rng: random.Random, turns: int) -> Messages:
    return chat([sum_turn(rng) for _ in range(turns)])
