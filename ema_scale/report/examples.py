"""Answers to read side by side: the same question, the aligned base and every defense in columns.

Nothing is picked by its outcome: questions are drawn by a hash of their ids, answers are the first samples
of the first run (by task, then seed).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from ema_scale.core.errors import UserError
from ema_scale.evaluation.look import verdict_of
from ema_scale.evaluation.records import Judgement, Sample, read_rows
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


Answers = dict[tuple[str, str], list[tuple[Sample, Judgement | None]]]


def examples(groups: Sequence[RunGroup]) -> tuple[list[Example], list[Problem]]:
    """Examples for the groups of one model, and notes on files that could not be read."""
    notes: list[Problem] = []
    answers_of: dict[Run, Answers] = {}
    chosen = []
    for role, count in QUESTIONS_PER_ROLE:
        for task, suite, identity, text in _draw(groups, role, count):
            columns, system = [], ""
            for group in groups:
                run = _first_run(group, task)
                if run is None:
                    continue
                if run not in answers_of:
                    answers_of[run] = _read(run, notes)
                rows = answers_of[run].get((suite, identity), [])
                if rows:
                    sample = rows[0][0]
                    system, text = system or sample.system or "", sample.asked or text
                    columns.append(Column(group.label, run.name, [_answer(*row, role) for row in rows]))
            if columns:
                chosen.append(Example(ROLE_NAMES[role], task, text, system, columns))
    return chosen, notes


def _draw(groups: Sequence[RunGroup], role: str, count: int) -> list[tuple[str, str, str, str]]:
    """(task, suite, id, text) of `count` questions, spread over tasks, drawn by their ids alone."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for run in (run for g in groups for run in g.runs if run.teaches or role == "benign"):
        for q in run.questions:
            if q.role == role and q.choice is None:  # written answers are nobody's
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


def _read(run: Run, notes: list[Problem]) -> Answers:
    """(suite, question id) -> its first ANSWERS samples, each with its judgement."""
    assert run.eval_dir is not None
    try:
        samples, judgements = read_rows(run.eval_dir)
    except (UserError, OSError) as error:
        notes.append(Problem(run.name, "note", f"answers left out: {error}"))
        return {}
    if not samples:
        notes.append(Problem(run.name, "note", "no samples.jsonl, so its answers are not shown"))
    # Judgements of several judges lie beside each other: the one of the summary counts.
    judges = run.summary.judges if run.summary else []
    by_key = {j.key: j for j in sorted(judgements, key=lambda j: j.judge in judges)}
    answers: Answers = {}
    for sample in sorted(samples, key=lambda s: (s.paraphrase, s.sample)):
        rows = answers.setdefault((sample.suite, sample.question_id), [])
        # Only the first paraphrase: the reader compares answers to one wording.
        if len(rows) < ANSWERS and (not rows or rows[0][0].question == sample.question):
            rows.append((sample, by_key.get(sample.key)))
    return answers


def _answer(sample: Sample, judgement: Judgement | None, role: str) -> ShownAnswer:
    verdict, scores = verdict_of(judgement, role == "benign")
    return ShownAnswer(sample.answer[:LONGEST], max(0, len(sample.answer) - LONGEST), verdict, scores)
