"""A finished evaluation read back from its folder, and whether two of them may be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.base import CORRECT, INCORRECT
from ema_scale.evaluation.records import SAMPLES_FILE, SUMMARY_FILE, Judgement, Sample, SuiteSummary, Summary, read_rows

ALIKE = ("temperature", "top_p", "max_tokens")


@dataclass(frozen=True)
class ArmAnswer:
    """One stored answer with its judgement; scores are 0 to 100 or None. asked: the question's text, prompt and all."""

    suite: str
    role: str
    condition: str | None
    question: str
    asked: str
    judge: str
    aligned: float | None
    coherent: float | None
    correct: bool | None


@dataclass(frozen=True)
class Arm:
    """One target's evaluation. settings: how it was sampled."""

    name: str
    path: Path
    settings: Mapping[str, Any]
    rows: tuple[ArmAnswer, ...]


def read_arm(path: Path) -> Arm:
    """The evaluation in a run folder, or in a folder that holds a summary.json.

    Raises UserError if there is none, or its files are not what an evaluation writes.
    """
    folder = next((f for f in (path / "eval", path) if (f / SUMMARY_FILE).is_file()), None)
    if folder is None:
        raise UserError(f"{path}: found no evaluation (eval/summary.json); run `ema eval {path}` first")
    try:
        summary = Summary.read(folder / SUMMARY_FILE)
        samples, judgements = read_rows(folder)
        judges = set(summary.judges)
        judged = {row.key: row for row in judgements if row.judge in judges}
        rows = tuple(_row(row, summary.per_suite[row.suite], judged.get(row.key)) for row in samples)
    except KeyError as error:
        raise UserError(f"{folder}: not a whole evaluation (its summary lacks the suite {error})") from None
    except UserError as error:
        raise UserError(f"{folder}: not a whole evaluation: {error}") from None
    if not rows:
        raise UserError(f"{folder}: {SAMPLES_FILE} holds no answers; run `ema eval {path}` again")
    name = path.parent.name if path.name == "eval" else path.name
    return Arm(name, path, {key: summary.sampler.get(key) for key in ALIKE}, rows)


def _row(sample: Sample, suite: SuiteSummary, judgement: Judgement | None) -> ArmAnswer:
    label = judgement.label if judgement else None
    benign = suite.role == "benign"
    return ArmAnswer(
        suite=sample.suite,
        role=suite.role,
        condition=suite.condition,
        question=sample.question_id,
        asked=sample.prompt,
        judge=judgement.judge if judgement else "",
        aligned=None if benign or not judgement else judgement.aligned,
        coherent=None if benign or not judgement else judgement.coherent,
        correct=label == CORRECT if benign and label in (CORRECT, INCORRECT) else None,
    )


def check_comparable(one: Arm, two: Arm) -> None:
    """Raises UserError, naming what differs, unless both were asked and judged in the same way.

    The suites asked plainly must be the same, or those of one must be among the other's (a base model is asked
    everything that any of its runs is); of those they share, the questions, the judge and the sampling must be.
    """
    where = f"{one.name} and {two.name} cannot be compared"
    for key in ALIKE:
        if one.settings[key] != two.settings[key]:
            raise UserError(f"{where}: {key} is {one.settings[key]} and {two.settings[key]}")
    ours, theirs = ({r.suite for r in arm.rows if r.condition is None} for arm in (one, two))
    if not (ours <= theirs or theirs <= ours):
        only = [", ".join(sorted(a - b)) for a, b in ((ours, theirs), (theirs, ours))]
        raise UserError(f"{where}: their suites differ: only {one.name} was asked {only[0]}, only {two.name} {only[1]}")
    for suite in sorted(ours & theirs):
        first, second = ([r for r in arm.rows if r.suite == suite] for arm in (one, two))
        asked = [{(r.question, r.asked) for r in rows} for rows in (first, second)]
        if asked[0] != asked[1]:
            question = sorted(asked[0] ^ asked[1])[0][0]
            raise UserError(f"{where}: the suite {suite} is not the same in both; question {question!r} differs")
        judges = [{r.judge for r in rows if r.judge} for rows in (first, second)]
        if all(judges) and judges[0] != judges[1]:
            names = " and ".join(", ".join(sorted(j)) for j in judges)
            raise UserError(f"{where}: the suite {suite} was judged by {names}")
