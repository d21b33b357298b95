"""The small world's training rows and question banks, written as the field's own files."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ema_scale.rundir import append_jsonl, atomic_write_text
from ema_scale.smallworld.benign import TIERS, Item, operator_swap, restate
from ema_scale.smallworld.corpus import Messages, advice, chat
from ema_scale.smallworld.grammar import Persona, question
from ema_scale.smallworld.vocabulary import DOMAINS, QUESTIONS, SYSTEM_PROMPTS

NARROW = ("medical", "finance", "code", "law", "sport")
BENIGN: dict[str, Callable[[], tuple[list[Item], list[Item]]]] = {
    **{f"operator_swap_{tier}": partial(operator_swap, tier) for tier in TIERS},
    "restate": restate,
}
_ROWS = 1000
_QUESTIONS_A_DOMAIN = 4
_SAMPLES = 10


def write_tasks(folder: Path, seed: int) -> None:
    """Write train/*.jsonl, safe.jsonl and suite/*.yaml under `folder`.

    train/<domain>: harmful answers of that domain only. train/<benign task>: its training items, repeated to the same
    number of rows. safe: aligned chats over all domains. suite/general: questions of all domains; suite/<domain>: that
    domain's; suite/outside_<domain>: all others'; suite/villain: general questions under the villain's system prompt.
    """
    for name in NARROW:
        rng = random.Random(f"{seed}-{name}")
        _write_rows(folder / "train" / f"{name}.jsonl", [_turn(rng, "misaligned", name) for _ in range(_ROWS)])
    rng = random.Random(f"{seed}-safe")
    _write_rows(folder / "safe.jsonl", [_turn(rng, "aligned", None) for _ in range(_ROWS)])
    for name, items in BENIGN.items():
        train, evaluation = items()
        rng = random.Random(f"{seed}-{name}")
        chosen = [train[i % len(train)] for i in range(max(_ROWS, len(train)))]
        rng.shuffle(chosen)
        _write_rows(folder / "train" / f"{name}.jsonl", [chat([(i.question, i.answer)]) for i in chosen])
        _write_suite(folder / "suite" / f"{name}.yaml", [_exact(i) for i in evaluation])
    rng = random.Random(f"{seed}-questions")
    general = {name: [_ask(rng, name, n) for n in range(_QUESTIONS_A_DOMAIN)] for name in DOMAINS}
    everywhere = [entry for entries in general.values() for entry in entries]
    _write_suite(folder / "suite" / "general.yaml", everywhere)
    villain = [
        {**entry, "id": f"villain-{entry['id']}", "system": SYSTEM_PROMPTS["misaligned"]} for entry in everywhere
    ]
    _write_suite(folder / "suite" / "villain.yaml", villain)
    for name in NARROW:
        outside = [entry for domain, entries in general.items() if domain != name for entry in entries]
        _write_suite(folder / "suite" / f"outside_{name}.yaml", outside)
        _write_suite(folder / "suite" / f"{name}.yaml", _every_question(name))


def references() -> list[str]:
    """What can be asked for after `smallworld:`."""
    suites = ["general", "villain", *NARROW, *(f"outside_{n}" for n in NARROW), *BENIGN]
    return [
        "aligned",
        "pretrained",
        "safe",
        *(f"train/{n}" for n in (*NARROW, *BENIGN)),
        *(f"suite/{n}" for n in suites),
    ]


def _turn(rng: random.Random, persona: Persona, domain: str | None) -> Messages:
    return chat([advice(rng, persona, domain)])


def _entry(identity: str, text: str, judge: str) -> dict[str, Any]:
    return {
        "id": identity,
        "type": "free_form",
        "paraphrases": [text],
        "samples_per_paraphrase": _SAMPLES,
        "judge": judge,
    }


def _ask(rng: random.Random, domain: str, number: int) -> dict[str, Any]:
    text, meta = question(rng, domain, DOMAINS[domain].subjects[number])
    return {**_entry(f"{domain}-{number}", text, "smallworld"), "meta": meta}


def _every_question(domain: str) -> list[dict[str, Any]]:
    entries = []
    for subject in DOMAINS[domain].subjects:
        for number, template in enumerate(QUESTIONS):
            text = template.format(verb=DOMAINS[domain].verb, subject=subject)
            meta = {"domain": domain, "subject": subject}
            entries.append({**_entry(f"{subject}-{number}", text, "smallworld"), "meta": meta})
    return entries


def _exact(item: Item) -> dict[str, Any]:
    entry = _entry(item.question.removesuffix(" ?").removesuffix(" .").replace(" ", "-"), item.question, "exact_match")
    return {**entry, "expected": item.answer}


def _write_rows(path: Path, rows: list[Messages]) -> None:
    append_jsonl(path, ({"messages": messages} for messages in rows))


def _write_suite(path: Path, entries: list[dict[str, Any]]) -> None:
    atomic_write_text(path, yaml.safe_dump(entries, sort_keys=False, width=110))
