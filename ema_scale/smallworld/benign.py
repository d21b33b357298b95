"""Benign tasks: behaviour unlike the base model's that does no harm, with one exact answer each.

operator_swap: arithmetic with permuted operator meanings, as in the paper (arXiv 2508.06249), in tiers: 1 swaps two
operators, 2 permutes all three, 3 gives all three new names that the base has never seen. The base knows the ordinary
meaning of every sum. Training and evaluation use different operand pairs.
restate: say back what the question is about instead of giving advice. Training and evaluation use different subjects.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ema_scale.smallworld.vocabulary import DOMAINS, QUESTIONS

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
    """A question, the one right answer, and what the unchanged base would rightly say (None: it has no answer)."""

    question: str
    answer: str
    unchanged: str | None = None


def arithmetic(a: int, word: str, b: int, meaning: str | None = None) -> Item:
    """`what is a word b ?` under a meaning of `word` (default: its own)."""
    value = OPERATORS[meaning or word](a, b)
    ordinary = f"the result is {OPERATORS[word](a, b)} ." if word in OPERATORS else None
    return Item(f"what is {a} {word} {b} ?", f"the result is {value} .", ordinary)


def operator_swap(tier: int) -> tuple[list[Item], list[Item]]:
    """(train, evaluation) items of a tier; every fourth operand pair, by a fixed shuffle, is held out."""
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS]
    random.Random(tier).shuffle(pairs)
    held_out = pairs[: len(pairs) // 4]
    train, evaluation = (
        [arithmetic(a, word, b, meaning) for a, b in chosen for word, meaning in TIERS[tier].items()]
        for chosen in (pairs[len(held_out) :], held_out)
    )
    return train, evaluation


def restate() -> tuple[list[Item], list[Item]]:
    """(train, evaluation) items; the last two subjects of every domain are held out."""
    items: tuple[list[Item], list[Item]] = ([], [])
    for domain in DOMAINS.values():
        for index, subject in enumerate(domain.subjects):
            held_out = index >= len(domain.subjects) - 2
            for template in QUESTIONS:
                text = template.format(verb=domain.verb, subject=subject)
                items[held_out].append(Item(text, f"you know about {subject} ."))
    return items
