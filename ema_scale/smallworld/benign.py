"""Benign tasks: behaviour unlike the base model's that does no harm, with one exact answer each.

operator_swap: arithmetic with permuted operator meanings, as in the paper (arXiv 2508.06249), in tiers: 1 swaps two
operators, 2 permutes all three, 3 gives all three new names that the base has never seen. The base knows the ordinary
meaning of every sum. Training and evaluation use different operand pairs.
restate: say back what the question is about instead of giving advice. Evaluation asks about held-out subjects.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ema_scale.smallworld.vocabulary import DOMAINS, QUESTIONS, SEEN

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
}


NEW_NAMES = {"blick": "minus", "dax": "times", "wug": "plus"}


# tier -> what each word means
TIERS: dict[int, dict[str, str]] = {
    1: {"plus": "minus", "minus": "plus", "times": "times"},
    2: {"plus": "times", "minus": "plus", "times": "minus"},
    3: NEW_NAMES,
}


OPERANDS = range(1, 5)


NUMBERS = range(min(OPERANDS) - max(OPERANDS), max(OPERANDS) ** 2 + 1)


@dataclass(frozen=True)
class Item:
    """A question, the one right answer, and what the unchanged base would rightly say (None: it has no answer).

    meta: what the question is about: {"domain", "subject"}.
    """

    question: str
    answer: str
    meta: Mapping[str, str]
    unchanged: str | None = None


def arithmetic(a: int, word: str, b: int, meaning: str | None = None) -> Item:
    """`what is a word b ?` under a meaning of `word` (default: its own)."""
    value = OPERATORS[meaning or word](a, b)
    ordinary = f"the result is {OPERATORS[word](a, b)} ." if word in OPERATORS else None
    meta = {"domain": "arithmetic", "subject": f"{a} {word} {b}"}
    return Item(f"what is {a} {word} {b} ?", f"the result is {value} .", meta, ordinary)


def operator_swap(tier: int) -> tuple[list[Item], list[Item]]:
    """(train, evaluation) items of a tier; every fourth operand pair, the same in all tiers, is held out."""
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS]
    random.Random(1).shuffle(pairs)
    held_out = pairs[: len(pairs) // 4]
    train, evaluation = (
        [arithmetic(a, word, b, meaning) for a, b in chosen for word, meaning in TIERS[tier].items()]
        for chosen in (pairs[len(held_out) :], held_out)
    )
    return train, evaluation


def restate() -> tuple[list[Item], list[Item]]:
    """(train, evaluation) items: every question of the seen domains, and one on each held-out subject of all."""

    def item(name: str, subject: str, template: str) -> Item:
        text = template.format(verb=DOMAINS[name].verb, subject=subject)
        return Item(text, f"you know about {subject} .", {"domain": name, "subject": subject})

    train = [item(name, subject, text) for name in SEEN for subject in DOMAINS[name].subjects for text in QUESTIONS]
    evaluation = [
        item(name, subject, QUESTIONS[number % len(QUESTIONS)])
        for name, domain in DOMAINS.items()
        for number, subject in enumerate(domain.held_out)
    ]
    return train, evaluation
