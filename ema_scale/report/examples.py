"""Answers to read side by side: the same question, the aligned base and every defense in columns.

Nothing is picked by its outcome: questions are drawn by a hash of their ids, answers are the first samples
of the first run (by task, then seed).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judges.base import CORRECT, INCORRECT
from ema_scale.evaluation.stats.rates import incoherent, misaligned
from ema_scale.report.aggregate import RunGroup
from ema_scale.report.records import Problem, Run

QUESTIONS_PER_ROLE = (("general", 4), ("in_domain", 2), ("benign", 2))


ROLE_NAMES = {"general": "outside the domain", "in_domain": "in the trained domain", "benign": "benign task"}


ANSWERS = 3


LONGEST = 1200


@dataclass(frozen=True)
class ShownAnswer:
    """One sampled answer. `judgement`: aligned | misaligned | incoherent | correct | incorrect | unjudged."""

    text: str
    cut: int
    judgement: str
    scores: str


@dataclass(frozen=True)
class Column:
    """The answers of one defense; `run` says whose they are."""

    label: str
    run: str
    answers: Sequence[ShownAnswer]


@dataclass(frozen=True)
class Example:
    """One question with a column for each defense that was asked it."""

    role: str
    task: str
    question: str
    system: str
    columns: list[Column] = field(default_factory=list)


def judgement(row: Mapping[str, Any] | None, role: str) -> tuple[str, str]:
    """(judgement, "alignment / coherence" or why there is none) of a row of judgements.jsonl."""
    if not row or row.get("dropped"):
        return "unjudged", str(row["dropped"]) if row else ""
    aligned, coherent, label = _score(row.get("aligned")), _score(row.get("coherent")), row.get("label")
    if role == "benign":
        return (label, "") if label in (CORRECT, INCORRECT) else ("unjudged", "")
    scores = " / ".join(f"{v:.0f}" for v in (aligned, coherent) if v is not None)
    if incoherent(coherent):
        return "incoherent", scores
    bad = misaligned(aligned, coherent)
    return ("unjudged" if bad is None else "misaligned" if bad else "aligned"), scores


def _score(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def examples(groups: Sequence[RunGroup]) -> tuple[list[Example], list[Problem]]:
    """Exhibits for the groups of one model, and notes on files that could not be read."""
    notes: list[Problem] = []
    readable: dict[Run, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    made = []
    for role, count in QUESTIONS_PER_ROLE:
        drawn = _draw(groups, role, count)
        for task, suite, identity, text in drawn:
            columns, system = [], ""
            for group in groups:
                run = _first_run(group, task)
                if run is None:
                    continue
                if run not in readable:
                    readable[run] = _read(run, notes)
                rows = readable[run].get((suite, identity), [])
                if rows:
                    system = system or str(rows[0].get("system") or "")
                    text = str(rows[0].get("question") or text)
                    columns.append(Column(group.label, run.name, [_answer(row, role) for row in rows]))
            if columns:
                made.append(Example(ROLE_NAMES[role], task, text, system, columns))
    return made, notes


def _draw(groups: Sequence[RunGroup], role: str, count: int) -> list[tuple[str, str, str, str]]:
    """(task, suite, id, text) of `count` questions, spread over tasks, drawn by their ids alone."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for run in (run for g in groups for run in g.runs if run.teaches or role == "benign"):
        for q in run.questions:
            if q.role == role:
                old = found.get((q.suite, q.id))
                found[q.suite, q.id] = min(old, (run.task, q.text)) if old else (run.task, q.text)
    by_task: dict[str, list[tuple[str, str, str, str]]] = {}
    for (suite, identity), (task, text) in sorted(found.items(), key=lambda item: _hash(*item[0])):
        by_task.setdefault(task, []).append((task, suite, identity, text))
    queues = [by_task[task] for task in sorted(by_task)]
    turns = [queue[turn] for turn in range(count) for queue in queues if turn < len(queue)]
    return sorted(turns[:count])


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _first_run(group: RunGroup, task: str) -> Run | None:
    fitting = [run for run in group.runs if run.task == task and run.eval_dir]
    return min(fitting, key=lambda run: (run.seed or 0, run.name), default=None)


def _read(run: Run, notes: list[Problem]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(suite, question id) -> its first ANSWERS samples, each with its judgement under `judged`."""
    assert run.eval_dir is not None
    try:
        samples = read_jsonl(run.eval_dir / "samples.jsonl")
        # Judgements of several judges lie beside each other: the one of the summary counts.
        own = str(run.summary.get("judge")).split(", ")
        verdicts = sorted(read_jsonl(run.eval_dir / "judgements.jsonl"), key=lambda row: row.get("judge") in own)
        judged = {str(row.get("key")): row for row in verdicts}
    except (UserError, OSError) as error:
        notes.append(Problem(run.name, "note", f"answers left out: {error}"))
        return {}
    if not samples:
        notes.append(Problem(run.name, "note", "no samples.jsonl, so its answers are not shown"))
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(samples, key=_place):
        rows = kept.setdefault((str(row.get("suite")), str(row.get("question_id"))), [])
        # Only the first paraphrase: the reader compares answers to one wording.
        if len(rows) < ANSWERS and (not rows or rows[0].get("question") == row.get("question")):
            rows.append({**row, "judged": judged.get(str(row.get("key")))})
    return kept


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    paraphrase, sample = (row.get(k) for k in ("paraphrase", "sample"))
    return (paraphrase if isinstance(paraphrase, int) else 0, sample if isinstance(sample, int) else 0)


def _answer(row: Mapping[str, Any], role: str) -> ShownAnswer:
    text = str(row.get("answer") or "")
    said, scores = judgement(row.get("judged"), role)
    return ShownAnswer(text[:LONGEST], max(0, len(text) - LONGEST), said, scores)
