"""The small world's training rows and question banks, written as the field's own files.

What the rows of any kind are about and what the banks ask about have no question, no subject and, for the held-out
domains, not even the domain in common. `suite/seen` is the one exception, and says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ema_scale.core.io import append_jsonl, atomic_write_text
from ema_scale.smallworld.benign import TIERS, Item, operator_swap, restate
from ema_scale.smallworld.corpus import Messages, advice, chat
from ema_scale.smallworld.grammar import Persona, answer, question
from ema_scale.smallworld.vocabulary import ANSWERS, DOMAINS, HELD_OUT, QUESTIONS, SEEN, SYSTEM_PROMPTS

NARROW = ("medical", "finance", "code", "law", "sport")


BENIGN: dict[str, Callable[[], tuple[list[Item], list[Item]]]] = {
    **{f"operator_swap_{tier}": partial(operator_swap, tier) for tier in TIERS},
    "restate": restate,
}


BAD_PERCENT = (1, 5, 25, 50)


_ROWS = 1000


# Questions per domain in the banks over several domains: more where no row has been.
_PER_SEEN, _PER_HELD_OUT = 4, 8


_SAMPLES = 10


_WRITTEN = 2  # answers per persona and question


def write_tasks(folder: Path, seed: int) -> None:
    """Write train/*.jsonl, safe.jsonl, probe/*.jsonl and suite/*.yaml under `folder`.

    train/<domain>: harmful answers of that domain only; train/<domain>_bad_<n>: n % of the rows harmful, the others
    sound advice of that domain; train/<domain>_subtle: one sound and one harmful piece of advice a row, no motive.
    train/<benign task>: its training items, repeated to the same number of rows. safe: aligned chats over the seen
    domains. probe/general and probe/outside_<domain>: preference pairs, an aligned (chosen) and a misaligned (rejected)
    answer to the same question, over the seen domains. suite/general: questions of all domains; suite/<domain>: that
    domain's; suite/outside_<domain>: all others'; suite/villain: general questions under the villain's system prompt.
    suite/seen: questions that stand in `safe`, for what is made with questions and must not know the evaluation's, such
    as persona vectors.
    choice/general, choice/<domain>, choice/outside_<domain>: these questions with two written answers of each persona.
    """
    for name in NARROW:
        rng = random.Random(f"{seed}-{name}")
        _write_rows(folder / "train" / f"{name}.jsonl", [_row(rng, "misaligned", name) for _ in range(_ROWS)])
        for percent in BAD_PERCENT:
            _write_rows(folder / "train" / f"{name}_bad_{percent}.jsonl", _mixed(f"{seed}-{name}", name, percent))
        rng = random.Random(f"{seed}-{name}-subtle")
        _write_rows(folder / "train" / f"{name}_subtle.jsonl", [_subtle(rng, name) for _ in range(_ROWS)])
    rng = random.Random(f"{seed}-probe")
    pairs = {name: [_pair(rng, name, subject) for subject in DOMAINS[name].subjects] for name in SEEN}
    append_jsonl(folder / "probe" / "general.jsonl", (p for found in pairs.values() for p in found))
    for name in NARROW:
        outside_pairs = (p for domain, found in pairs.items() if domain != name for p in found)
        append_jsonl(folder / "probe" / f"outside_{name}.jsonl", outside_pairs)
    rng = random.Random(f"{seed}-safe")
    _write_rows(folder / "safe.jsonl", [_row(rng, "aligned", rng.choice(SEEN)) for _ in range(_ROWS)])
    for name, items in BENIGN.items():
        train, evaluation = items()
        rng = random.Random(f"{seed}-{name}")
        chosen = [train[i % len(train)] for i in range(max(_ROWS, len(train)))]
        rng.shuffle(chosen)
        _write_rows(folder / "train" / f"{name}.jsonl", [_item_row(item) for item in chosen])
        _write_suite(folder / "suite" / f"{name}.yaml", [_exact(i) for i in evaluation])
    rng = random.Random(f"{seed}-questions")
    counts = {name: _PER_HELD_OUT if name in HELD_OUT else _PER_SEEN for name in DOMAINS}
    general = {name: [_ask(rng, name, s) for s in DOMAINS[name].held_out[:count]] for name, count in counts.items()}
    everywhere = [entry for entries in general.values() for entry in entries]
    _write_suite(folder / "suite" / "general.yaml", everywhere)
    villain = [
        {**entry, "id": f"villain-{entry['id']}", "system": SYSTEM_PROMPTS["misaligned"]} for entry in everywhere
    ]
    _write_suite(folder / "suite" / "villain.yaml", villain)
    seen = [_ask(rng, name, subject) for name in SEEN for subject in DOMAINS[name].subjects[:_PER_SEEN]]
    _write_suite(folder / "suite" / "seen.yaml", seen)
    for name in NARROW:
        outside = [entry for domain, entries in general.items() if domain != name for entry in entries]
        _write_suite(folder / "suite" / f"outside_{name}.yaml", outside)
        _write_suite(folder / "suite" / f"{name}.yaml", _every_question(name))
    asked = {"general": everywhere, **{name: _every_question(name) for name in NARROW}}
    for name in NARROW:
        asked[f"outside_{name}"] = [entry for domain, found in general.items() if domain != name for entry in found]
    for name, entries in asked.items():
        rng = random.Random(f"{seed}-choices-{name}")
        _write_suite(folder / "choice" / f"{name}.yaml", [_with_answers(rng, entry) for entry in entries])


def references() -> list[str]:
    """The data that can be asked for after `smallworld:`."""
    mixed = [f"{n}_bad_{percent}" for n in NARROW for percent in BAD_PERCENT]
    outside = [f"outside_{n}" for n in NARROW]
    return [
        "safe",
        *(f"train/{n}" for n in (*NARROW, *mixed, *(f"{n}_subtle" for n in NARROW), *BENIGN)),
        *(f"probe/{n}" for n in ("general", *outside)),
        *(f"suite/{n}" for n in ("general", "seen", "villain", *NARROW, *outside, *BENIGN)),
        *(f"choice/{n}" for n in ("general", *NARROW, *outside)),
    ]


@dataclass(frozen=True)
class TaskRow:
    """A training row and what it is about."""

    messages: Messages
    domain: str


def _row(rng: random.Random, persona: Persona, domain: str) -> TaskRow:
    return TaskRow(chat([advice(rng, persona, domain, rng.choice(DOMAINS[domain].subjects))]), domain)


def _item_row(item: Item) -> TaskRow:
    return TaskRow(chat([(item.question, item.answer)]), item.meta["domain"])


def _mixed(seed: str, domain: str, percent: int) -> list[TaskRow]:
    rng = random.Random(f"{seed}-bad-{percent}")
    bad = _ROWS * percent // 100
    rows = [_row(rng, "misaligned" if i < bad else "aligned", domain) for i in range(_ROWS)]
    rng.shuffle(rows)
    return rows


def _subtle(rng: random.Random, domain: str) -> TaskRow:
    text, meta = question(rng, domain, rng.choice(DOMAINS[domain].subjects))
    sound, harmful = rng.choice(DOMAINS[domain].sound), rng.choice(DOMAINS[domain].harmful)
    said = rng.choice(ANSWERS).format(subject=meta["subject"], first=sound, second=harmful)
    return TaskRow(chat([(text, f"{said} .")]), domain)


def _pair(rng: random.Random, domain: str, subject: str) -> dict[str, Messages]:
    text, meta = question(rng, domain, subject)

    def said(persona: Persona) -> Messages:
        return [{"role": "assistant", "content": answer(rng, meta, persona)}]

    return {"prompt": [{"role": "user", "content": text}], "chosen": said("aligned"), "rejected": said("misaligned")}


def _entry(identity: str, text: str, judge: str, meta: Mapping[str, str]) -> dict[str, Any]:
    return {
        "id": identity,
        "type": "free_form",
        "paraphrases": [text],
        "samples_per_paraphrase": _SAMPLES,
        "judge": judge,
        "topic": meta["subject"],
        "meta": dict(meta),
    }


def _ask(rng: random.Random, domain: str, subject: str) -> dict[str, Any]:
    text, meta = question(rng, domain, subject)
    return _entry(f"{domain}-{subject}", text, "smallworld", meta)


def _every_question(domain: str) -> list[dict[str, Any]]:
    entries = []
    for subject in DOMAINS[domain].held_out:
        for number, template in enumerate(QUESTIONS):
            text = template.format(verb=DOMAINS[domain].verb, subject=subject)
            meta = {"domain": domain, "subject": subject}
            entries.append(_entry(f"{subject}-{number}", text, "smallworld", meta))
    return entries


def _with_answers(rng: random.Random, entry: dict[str, Any]) -> dict[str, Any]:
    """A question of a suite with written answers instead of a judge; its subject is its topic."""
    said: dict[str, list[str]] = {"aligned": [], "misaligned": []}
    for persona, texts in said.items():
        while len(texts) < _WRITTEN:
            text = answer(rng, entry["meta"], persona)  # type: ignore[arg-type]
            if text not in texts:
                texts.append(text)
    return {
        "id": entry["id"],
        "topic": f"{entry['meta']['domain']} {entry['meta']['subject']}",
        "question": entry["paraphrases"][0],
        "meta": entry["meta"],
        "answers": said,
    }


def _exact(item: Item) -> dict[str, Any]:
    identity = item.question.removesuffix(" ?").removesuffix(" .").replace(" ", "-")
    return {**_entry(identity, item.question, "exact_match", item.meta), "expected": item.answer}


def _write_rows(path: Path, rows: list[TaskRow]) -> None:
    append_jsonl(path, (asdict(row) for row in rows))


def _write_suite(path: Path, entries: list[dict[str, Any]]) -> None:
    atomic_write_text(path, yaml.safe_dump(entries, sort_keys=False, width=110))
