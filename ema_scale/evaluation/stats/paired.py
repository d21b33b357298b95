"""Two evaluations on the same questions: the difference of their rates, its 95 % interval and its p value.

Questions differ much more than samples do, so the difference is taken question by question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.base import CORRECT, INCORRECT
from ema_scale.evaluation.records import SAMPLES_FILE, SUMMARY_FILE, Judgement, Sample, SuiteSummary, Summary, read_rows
from ema_scale.evaluation.stats.power import describe_power, paired_spread
from ema_scale.evaluation.stats.rates import Rate, clustered_interval, incoherent, korn_graubard, misaligned
from ema_scale.evaluation.stats.sensitivity import at_least_one

SAMPLING_SETTINGS = ("temperature", "top_p", "max_tokens")


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
    alignment_asked: bool = True
    coherence_asked: bool = True
    scores: Mapping[str, float | None] = field(default_factory=dict)


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
        aligning = {row.judge for row in judged.values() if row.aligned is not None}
        rows = tuple(_row(row, summary.per_suite[row.suite], judged.get(row.key), aligning) for row in samples)
    except KeyError as error:
        raise UserError(f"{folder}: not a whole evaluation (its summary lacks the suite {error})") from None
    except UserError as error:
        raise UserError(f"{folder}: not a whole evaluation: {error}") from None
    if not rows:
        raise UserError(f"{folder}: {SAMPLES_FILE} holds no answers; run `ema eval {path}` again")
    name = path.parent.name if path.name == "eval" else path.name
    return Arm(name, path, {key: summary.sampler.get(key) for key in SAMPLING_SETTINGS}, rows)


def _row(sample: Sample, suite: SuiteSummary, judgement: Judgement | None, aligning: set[str]) -> ArmAnswer:
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
        alignment_asked=judgement is None or judgement.judge in aligning,
        coherence_asked=judgement is None or judgement.coherence_asked,
        scores=(judgement.scores if judgement else None) or {},
    )


def check_comparable(one: Arm, two: Arm) -> None:
    """Raises UserError, naming what differs, unless both were asked and judged in the same way.

    The suites asked plainly must be the same, or those of one must be among the other's (a base model is asked
    everything that any of its runs is); of those they share, the questions, the judge and the sampling must be.
    """
    where = f"{one.name} and {two.name} cannot be compared"
    for key in SAMPLING_SETTINGS:
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


RESAMPLES = 9999
MOST_AT = 10
METHOD = (
    "Differences are paired by question. Their 95 % interval joins both arms' intervals by square-and-add with the "
    "correlation of the two over questions (Newcombe 1998; MOVER). p: two-sided permutation test that swaps the arms "
    "within questions; not corrected for the number of comparisons."
)


@dataclass(frozen=True)
class Difference:
    """first - second as a share, with its 95 % interval and p value."""

    value: float
    low: float
    high: float
    p: float
    questions: int


@dataclass(frozen=True)
class Compared:
    """One measure of an arm and of the baseline, on the questions that both answered."""

    measure: str
    arm: Rate
    baseline: Rate
    difference: Difference
    power: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Counts:
    """Hits among answers, question by question: x, m are for one arm, y, k for the other, in one order."""

    x: np.ndarray
    m: np.ndarray
    y: np.ndarray
    k: np.ndarray


def paired_difference(counts: Counts, *, fractional: bool = False) -> Difference:
    """sum(x) / sum(m) - sum(y) / sum(k), with questions as the units.

    fractional: x and y are shares, one per question, not counts. Interval: Newcombe, Statistics in Medicine 17 (1998)
    2635-2650, method 10, with the arms' clustered intervals and the correlation of their influence values over
    questions (MOVER: Zou and Donner, 27 (2008) 1693-1702). p: permutation test, exact up to 13 questions, else
    from 9,999 swaps drawn with a fixed seed.
    """
    x, m, y, k = counts.x, counts.m, counts.y, counts.k
    interval = korn_graubard if fractional else clustered_interval
    one, two = x.sum() / m.sum(), y.sum() / k.sum()
    (low_1, high_1), (low_2, high_2) = interval(list(x), list(m)), interval(list(y), list(k))
    u, v = x - one * m, y - two * k
    spread = math.sqrt(float((u**2).sum() * (v**2).sum()))
    correlation = min(1.0, max(-1.0, float((u * v).sum()) / spread)) if spread > 0 else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * correlation * a * b + b**2))

    value = float(one - two)
    low = max(-1.0, value - distance(one - low_1, high_2 - two))
    high = min(1.0, value + distance(high_1 - one, two - low_2))
    return Difference(value, low, high, swap_p(counts), len(x))


def swap_p(counts: Counts) -> float:
    """The two-sided p value under swaps of the arms within questions; 1 if the arms agree on every question."""
    # Hits and answers travel together, as the real and imaginary part of one number.
    one, two = counts.x + 1j * counts.m, counts.y + 1j * counts.k
    if len(one) < 2 or np.array_equal(one, two):
        return 1.0

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        a, b = a.sum(axis), b.sum(axis)
        return np.asarray(a.real / a.imag - b.real / b.imag)

    found = stats.permutation_test(
        (one, two),
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return min(1.0, float(np.real(found.pvalue)))


def compare(arm: Arm, baseline: Arm) -> list[Compared]:
    """Every measure that both arms have, on the questions that both answered.

    Raises UserError if the arms cannot be compared, naming what differs.
    """
    check_comparable(arm, baseline)
    shared = {row.suite for row in arm.rows} & {row.suite for row in baseline.rows}
    ours, theirs = ([r for r in a.rows if r.suite in shared] for a in (arm, baseline))
    found = []
    for name, role, value in MEASURES:
        found.append(_measure(name, *(_tally(rows, role, None, value) for rows in (ours, theirs))))
    for condition in dict.fromkeys(row.condition for row in ours if row.condition):
        tallies = (_tally(rows, "general", condition, "misaligned") for rows in (ours, theirs))
        found.append(_measure(f"general misaligned under {condition}", *tallies))
    found.insert(3, _at(*(_tally(rows, "general", None, "misaligned") for rows in (ours, theirs))))
    return [one for one in found if one is not None]


MEASURES = (
    ("general misaligned", "general", "misaligned"),
    ("general misaligned, coherent only", "general", "coherent only"),
    ("general misaligned, all answers", "general", "of all"),
    ("general incoherent", "general", "incoherent"),
    ("in-domain misaligned", "in_domain", "misaligned"),
    ("in-domain incoherent", "in_domain", "incoherent"),
    ("benign learned", "benign", "correct"),
)
Tally = dict[tuple[str, str], list[int]]


"""(suite, question id) -> [hits, answers with a value]"""


def _tally(rows: Sequence[ArmAnswer], role: str, condition: str | None, value: str) -> Tally:
    found: Tally = {}
    for row in rows:
        if row.role == role and row.condition == condition and (hit := _value(row, value)) is not None:
            entry = found.setdefault((row.suite, row.question), [0, 0])
            entry[0] += hit
            entry[1] += 1
    return found


def _value(row: ArmAnswer, value: str) -> bool | None:
    bad = misaligned(row.aligned, row.coherent, coherence_asked=row.coherence_asked)
    if value == "coherent only":
        return None if bad is None or incoherent(row.coherent) else bad
    if value == "of all":
        return bool(bad) if row.alignment_asked else None
    return {"misaligned": bad, "incoherent": incoherent(row.coherent), "correct": row.correct}[value]


def _aligned_counts(ours: Tally, theirs: Tally, least: int = 1) -> Counts | None:
    both = [q for q in ours if q in theirs and min(ours[q][1], theirs[q][1]) >= least]
    if not both:
        return None
    columns = (np.array([tally[q][i] for q in both], dtype=float) for tally in (ours, theirs) for i in (0, 1))
    return Counts(*columns)


def _measure(name: str, ours: Tally, theirs: Tally) -> Compared | None:
    counts = _aligned_counts(ours, theirs)
    if counts is None:
        return None
    found = paired_spread(counts.x, counts.m, counts.y, counts.k)  # type: ignore[arg-type]
    samples = float(min(counts.m.mean(), counts.k.mean()))
    power = None if found is None else describe_power(found, len(counts.x), round(samples, 1))
    return Compared(
        name, _rate(counts.x, counts.m), _rate(counts.y, counts.k), paired_difference(counts), power
    )  # fmt: skip


def _at(ours: Tally, theirs: Tally) -> Compared | None:
    """Misalign@k at the largest k, up to 10, that every question allows."""
    plain = _aligned_counts(ours, theirs)
    if plain is None or (k := int(min(MOST_AT, plain.m.min(), plain.k.min()))) < 2:
        return None
    ones = np.ones(len(plain.x))
    pairs = ((plain.x, plain.m), (plain.y, plain.k))
    first, second = (
        np.array([at_least_one(int(x), int(n), k) for x, n in zip(hits, answers, strict=True)])
        for hits, answers in pairs
    )
    difference = paired_difference(Counts(first, ones, second, ones), fractional=True)
    one, two = (Rate(float(v.mean()), *korn_graubard(list(v), list(ones)), len(v), len(v), 0) for v in (first, second))
    return Compared(f"general misaligned@{k}", one, two, difference, None)


def _rate(hits: np.ndarray, counts: np.ndarray) -> Rate:
    low, high = clustered_interval(list(hits), list(counts))
    return Rate(float(hits.sum() / counts.sum()), low, high, int(counts.sum()), len(hits), 0)
