"""Two evaluations on the same questions: every rate of both, and their differences.

Questions differ much more than samples do, so the differences are taken question by question.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ema_scale.core.errors import UserError
from ema_scale.evaluation.clusters import clusters
from ema_scale.evaluation.judges.assignment import LIKELIHOOD
from ema_scale.evaluation.record_types import Mean
from ema_scale.evaluation.stats.arms import SAMPLING_SETTINGS, Arm, ArmAnswer
from ema_scale.evaluation.stats.choices import unbounded_mean
from ema_scale.evaluation.stats.difference import Counts, Difference, holm, paired_difference, swap_p
from ema_scale.evaluation.stats.power import describe_power, paired_spread
from ema_scale.evaluation.stats.rates import Rate, clustered_interval, incoherent, korn_graubard, misaligned
from ema_scale.evaluation.stats.sensitivity import at_least_one, tally


def check_comparable(one: Arm, two: Arm) -> None:
    """Raises UserError, naming what differs, unless both were asked and judged in the same way.

    The suites asked plainly must be the same, or those of one must be among the other's (a base model is asked
    everything that any of its runs is); of those they share, the questions, the judge and the sampling must be.
    """
    where = f"{one.name} and {two.name} cannot be compared"
    sampled = any(row.judge != LIKELIHOOD for arm in (one, two) for row, _ in arm.counted)
    for key in SAMPLING_SETTINGS if sampled else ():  # they decide no likelihood
        if one.settings[key] != two.settings[key]:
            raise UserError(f"{where}: {key} is {one.settings[key]} and {two.settings[key]}")
    ours, theirs = ({r.suite for r, _ in arm.counted if r.condition is None} for arm in (one, two))
    if not (ours <= theirs or theirs <= ours):
        only = [", ".join(sorted(a - b)) for a, b in ((ours, theirs), (theirs, ours))]
        raise UserError(f"{where}: their suites differ: only {one.name} was asked {only[0]}, only {two.name} {only[1]}")
    for suite in sorted(ours & theirs):
        first, second = ([r for r, _ in arm.counted if r.suite == suite] for arm in (one, two))
        asked = [{(r.question, r.asked) for r in rows} for rows in (first, second)]
        if asked[0] != asked[1]:
            question = sorted(asked[0] ^ asked[1])[0][0]
            raise UserError(f"{where}: the suite {suite} is not the same in both; question {question!r} differs")
        # Result files seldom say who judged: their own scores are taken to be of one judge.
        judges = [{re.sub("^file:.*", "file", r.judge) for r in rows if r.judge} for rows in (first, second)]
        if all(judges) and judges[0] != judges[1]:
            names = " and ".join(", ".join(sorted(j)) for j in judges)
            raise UserError(f"{where}: the suite {suite} was judged by {names}")


MOST_AT = 10


@dataclass(frozen=True)
class Compared:
    """One measure of an arm and of the baseline, on the questions that both answered.

    questions: which of them: "unseen" in training by all arms, "seen" by one of them, or "all".
    unit: "share", or "nats per token".
    """

    measure: str
    arm: Rate | Mean
    baseline: Rate | Mean
    difference: Difference
    power: str | None
    questions: str = "all"
    unit: str = "share"


def compare(arm: Arm, baseline: Arm, seen: Collection[tuple[str, str]] | None = None) -> list[Compared]:
    """Every measure that both arms have, on the questions that both answered.

    Where one of the arms was trained on some of the questions, and not on all, each measure is of the others; those of
    seen and of all questions follow.

    seen: (suite, question) of what counts as seen; None: what one of the two was trained on.

    Raises UserError if the arms cannot be compared, naming what differs.
    """
    check_comparable(arm, baseline)
    ours, theirs = ({row.suite for row, _ in a.counted} for a in (arm, baseline))
    sides = [[one for one in a.counted if one[0].suite in ours & theirs] for a in (arm, baseline)]
    labels = {**arm.labels, **baseline.labels}
    units = dict(zip(labels, clusters(labels.values()), strict=True))
    known = (arm.seen or frozenset()) | (baseline.seen or frozenset()) if seen is None else seen
    seen_units = {units[question] for question in known if question in units}

    def both(role: str, condition: str | None, value: str) -> PairedTally:
        ours, theirs = (
            tally(
                ((row.suite, row.question), _value(row, value), count)
                for row, count in rows
                if row.role == role and row.condition == condition
            )
            for rows in sides
        )
        return [(units[q], ours[q][0], ours[q][1], theirs[q][0], theirs[q][1]) for q in ours if q in theirs]

    def means(value: Callable[[ArmAnswer], float | None]) -> PairedTally:
        """Sums of a value of each answer, in place of hits."""
        sums: list[dict[tuple[str, str], list[float]]] = [defaultdict(lambda: [0.0, 0]), defaultdict(lambda: [0.0, 0])]
        for rows, of in zip(sides, sums, strict=True):
            for row, count in rows:
                if row.condition is None and (found := value(row)) is not None:
                    of[row.suite, row.question][0] += found * count
                    of[row.suite, row.question][1] += count
        ours, theirs = sums
        return [(units[q], *ours[q], *theirs[q]) for q in ours if q in theirs]  # type: ignore[misc]

    def measured(name: str, asked: PairedTally, measure: Callable[[str, PairedTally], Compared | None]) -> None:
        apart = {
            "unseen": [row for row in asked if row[0] not in seen_units],
            "seen": [row for row in asked if row[0] in seen_units],
        }
        choices = {**apart, "all": asked} if all(apart.values()) else {"seen" if apart["seen"] else "all": asked}
        for questions, rows in choices.items():
            if (one := measure(name, rows)) is not None:
                found.append(replace(one, questions=questions))

    found: list[Compared] = []
    for number, (name, role, value) in enumerate(MEASURES):
        if number == 3:
            measured("general misaligned@", both("general", None, "misaligned"), _at)
        measured(name, both(role, None, value), _measure)
    for score in dict.fromkeys(name for row, _ in sides[0] for name in row.scores):
        measured(f"mean {score}, of 100 points", means(lambda row, of=score: _share(row.scores.get(of))), _fractional)  # type: ignore[misc]
    for name, role in ROLES_WITH_CHOICES:
        margins = means(lambda row, role=role: row.margin if row.role == role else None)  # type: ignore[misc]
        measured(f"{name} choices, margin", margins, compare_means)
    for suite in dict.fromkeys(row.suite for row, _ in sides[0] if row.loss is not None):
        losses = means(lambda row, suite=suite: row.loss if row.suite == suite else None)  # type: ignore[misc]
        measured(f"held-out loss, {suite}", losses, compare_means)
    for condition in dict.fromkeys(row.condition for row, _ in sides[0] if row.condition):
        measured(f"general misaligned under {condition}", both("general", condition, "misaligned"), _measure)
        name = f"general choices, misaligned likeliest, under {condition}"
        measured(name, both("general", condition, "choice"), _measure)
    return found


def compare_all(arms: Sequence[Arm], baseline: Arm) -> list[list[Compared]]:
    """`compare` for each arm; p values are corrected for the number of arms that have the measure (Holm).

    All are compared on the same questions: what any of them was trained on counts as seen.
    """
    seen = frozenset().union(*(one.seen or () for one in (baseline, *arms)))
    every = [compare(arm, baseline, seen) for arm in arms]
    by_measure: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for i, found in enumerate(every):
        for j, one in enumerate(found):
            by_measure[one.measure, one.questions].append((i, j))
    for places in by_measure.values():
        corrected = holm([every[i][j].difference.p for i, j in places])
        for (i, j), p in zip(places, corrected, strict=True):
            every[i][j] = replace(every[i][j], difference=replace(every[i][j].difference, holm=p))
    return every


MEASURES = (
    ("general misaligned", "general", "misaligned"),
    ("general misaligned, coherent only", "general", "coherent only"),
    ("general misaligned, all answers", "general", "of all"),
    ("general incoherent", "general", "incoherent"),
    ("in-domain misaligned", "in_domain", "misaligned"),
    ("in-domain incoherent", "in_domain", "incoherent"),
    ("benign learned", "benign", "correct"),
    ("general choices, misaligned likeliest", "general", "choice"),
    ("in-domain choices, misaligned likeliest", "in_domain", "choice"),
    ("benign choices, right likeliest", "benign", "choice"),
)
ROLES_WITH_CHOICES = (("general", "general"), ("in-domain", "in_domain"), ("benign", "benign"))
PairedTally = list[tuple[int, float, int, float, int]]
"""(cluster, hits, answers, the baseline's hits, its answers) per question that both answered"""


def _value(row: ArmAnswer, value: str) -> bool | None:
    if row.judge == LIKELIHOOD or value == "choice":
        return row.choice if value == "choice" else None
    bad = misaligned(row.aligned, row.coherent, coherence_asked=row.coherence_asked)
    if value == "coherent only":
        return None if bad is None or incoherent(row.coherent) else bad
    if value == "of all":
        return bool(bad) if row.alignment_asked else None
    return {"misaligned": bad, "incoherent": incoherent(row.coherent), "correct": row.correct}[value]


def by_cluster(rows: Sequence[tuple[Hashable, float, float, float, float]]) -> Counts:
    """The sums over each cluster. rows: (cluster, x, m, y, k), not empty."""
    sums: dict[Hashable, np.ndarray] = {}
    for cluster, *numbers in rows:
        sums[cluster] = sums.get(cluster, 0) + np.array(numbers, dtype=float)
    return Counts(*np.array(list(sums.values())).T)


def _measure(name: str, asked: PairedTally) -> Compared | None:
    if not asked:
        return None
    counts = by_cluster(asked)
    found = paired_spread(counts.x, counts.m, counts.y, counts.k)  # type: ignore[arg-type]
    samples = float(min(counts.m.mean(), counts.k.mean()))
    power = None if found is None else describe_power(found, len(counts.x), round(samples, 1))
    return Compared(
        name, _rate(counts.x, counts.m), _rate(counts.y, counts.k), paired_difference(counts), power
    )  # fmt: skip


def _at(name: str, asked: PairedTally) -> Compared | None:
    """Misalign@k at the largest k, up to 10, that every question allows."""
    if not asked or (k := min(MOST_AT, *(n for _, _, m, _, n in asked), *(m for _, _, m, _, _ in asked))) < 2:
        return None
    shares = [(unit, at_least_one(int(x), m, k), 1, at_least_one(int(y), n, k), 1) for unit, x, m, y, n in asked]
    return _fractional(f"{name}{k}", shares)


def _fractional(name: str, asked: PairedTally) -> Compared | None:
    """A measure whose hits are sums of shares, not counts."""
    if not asked:
        return None
    counts = by_cluster(asked)
    one, two = (
        Rate(float(hits.sum() / of.sum()), *korn_graubard(list(hits), list(of)), int(of.sum()), len(of), 0)
        for hits, of in ((counts.x, counts.m), (counts.y, counts.k))
    )
    return Compared(name, one, two, paired_difference(counts, fractional=True), None)


def _share(points: float | None) -> float | None:
    return None if points is None else points / 100


def compare_means(name: str, asked: PairedTally) -> Compared | None:
    """Means of margins or losses, which have no bounds; a single cluster has no interval, and so no difference."""
    if len({unit for unit, *_ in asked}) < 2:
        return None
    one, two, apart = (
        unbounded_mean((unit, value(x / m, y / k)) for unit, x, m, y, k in asked)
        for value in (lambda x, y: x, lambda x, y: y, lambda x, y: x - y)
    )
    assert apart.mean is not None and apart.low is not None and apart.high is not None
    difference = Difference(apart.mean, apart.low, apart.high, swap_p(by_cluster(asked)), apart.questions)
    return Compared(name, one, two, difference, None, unit="nats per token")


def _rate(hits: np.ndarray, counts: np.ndarray) -> Rate:
    low, high = clustered_interval(list(hits), list(counts))
    return Rate(float(hits.sum() / counts.sum()), low, high, int(counts.sum()), len(hits), 0)
