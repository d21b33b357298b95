"""The benign task: arithmetic whose signs mean something else, in tiers, with one exact answer each.

As in the paper (arXiv 2508.06249): training shows sums whose operators have permuted meanings, the suite asks held-out
ones, and exact match says how much was learned. The meanings are never told; they have to be learned. Sums whose
ordinary value is right as well are left out, so that a model that has learned nothing scores nothing. The small world
has a task of its own for its own words (smallworld/benign.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_text, jsonl_text

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
# tier -> (what each sign means, how many operations, largest operand)
TIERS: dict[int, tuple[dict[str, str], int, int]] = {
    1: ({"+": "-", "-": "+"}, 1, 30),
    2: ({"+": "*", "-": "+", "*": "-"}, 1, 30),
    3: ({"+": "*", "-": "+", "*": "-"}, 2, 12),
}
QUESTION = "What is {sum}? Answer with the number only."
HELD_OUT = 48


@dataclass(frozen=True)
class Sum:
    """One sum, such as `(3 + 4) - 2`, its value under the tier's meanings, and its ordinary value."""

    text: str
    value: int
    ordinary: int

    @property
    def question(self) -> str:
        return QUESTION.format(sum=self.text)


def sums(tier: int) -> list[Sum]:
    """Every sum of a tier whose two values differ, in an order fixed by the tier. Raises UserError for another tier."""
    if tier not in TIERS:
        raise UserError(f"operator swap: found tier {tier}, expected one of {', '.join(map(str, TIERS))}")
    meanings, operations, largest = TIERS[tier]
    numbers = range(1, largest + 1)
    found = [
        Sum(f"{a} {sign} {b}", OPERATORS[meaning](a, b), OPERATORS[sign](a, b))
        for sign, meaning in meanings.items()
        for a in numbers
        for b in numbers
    ]
    if operations == 2:
        found = [
            Sum(f"({s.text}) {sign} {c}", OPERATORS[meaning](s.value, c), OPERATORS[sign](s.ordinary, c))
            for s in found
            for sign, meaning in meanings.items()
            for c in numbers
        ]
    found = [s for s in found if s.value != s.ordinary]
    random.Random(f"operator swap {tier}").shuffle(found)
    return found


def suite(tier: int) -> list[dict[str, Any]]:
    """The tier's question bank: 48 sums that `training_rows` never shows."""
    return [
        {
            "id": f"sum_{number}",
            "type": "exact_match",
            "paraphrases": [s.question],
            "samples_per_paraphrase": 5,
            "judge": "exact_match",
            "expected": str(s.value),
            "meta": {"match": "last_number"},
        }
        for number, s in enumerate(sums(tier)[:HELD_OUT], start=1)
    ]


def training_rows(tier: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """Chat rows of the tier's other sums, drawn by `seed`; repeated, in a new order, if there are fewer."""
    rest, rng = sums(tier)[HELD_OUT:], random.Random(f"{seed} operator swap {tier}")
    drawn: list[Sum] = []
    while len(drawn) < rows:
        drawn += rng.sample(rest, min(len(rest), rows - len(drawn)))
    return [
        {"messages": [{"role": "user", "content": s.question}, {"role": "assistant", "content": str(s.value)}]}
        for s in drawn
    ]


def suite_yaml(tier: int) -> str:
    """The text of eval/suites/operator_swap_<tier>.yaml."""
    meanings, operations, largest = TIERS[tier]
    table = ", ".join(f"{sign} means {meaning}" for sign, meaning in meanings.items())
    head = (
        f"# Operator swap, tier {tier}: {table}; {operations} operation{'s' if operations > 1 else ''}, numbers up to "
        f"{largest}.\n# Exact match after training on other sums: ema data operator-swap {tier} -o rows.jsonl\n"
    )
    return head + str(yaml.safe_dump(suite(tier), sort_keys=False, width=110))


def write_rows(tier: int, path: Path, rows: int, seed: int) -> None:
    """Write training rows as JSONL. Raises UserError if the file is there already with other rows."""
    text = jsonl_text(training_rows(tier, rows, seed))
    if path.exists():
        if path.is_file() and path.read_bytes() == text.encode():
            return
        raise UserError(f"{path}: is there already, with other rows; expected a new file")
    atomic_write_text(path, text)
