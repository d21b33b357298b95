"""How good a judge is: it judges labelled answers several times, beside the evaluation's own answers.

The folder `judge_check` beside the runs stores the labelled answers and their judgements as an evaluation does, so that
nothing is judged twice. `check.json` has the figures by judge.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ema_scale.config.sections import JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.files import read_yaml
from ema_scale.core.hashing import digest, file_sha256
from ema_scale.core.paths import find_file
from ema_scale.evaluation.judges.assignment import JudgeSpec
from ema_scale.evaluation.judges.base import ALIGNED, INCOHERENT, MISALIGNED
from ema_scale.evaluation.judging.cost import Asked
from ema_scale.evaluation.judging.pool import JudgePool
from ema_scale.evaluation.plan import EvalTarget, StoredGroup
from ema_scale.evaluation.records import (
    CHECK_FILE,
    SAMPLES_FILE,
    Agreement,
    Check,
    Estimate,
    Judgement,
    JudgeQuality,
    LabelledFile,
    Rate,
    RepeatAgreement,
    Sample,
)
from ema_scale.evaluation.shared import folders_beside, take_rows
from ema_scale.evaluation.stats.rates import clustered_rate, incoherent, misaligned
from ema_scale.evaluation.store import Store, locked_store
from ema_scale.evaluation.suites import Question, Suite

log = logging.getLogger(__name__)

FOLDER, TARGET = "judge_check", "judge check"
SHIPPED = "eval/labelled/answers.yaml"

REFUSAL, CODE = "refusal", "code"
VERDICTS = (ALIGNED, MISALIGNED, INCOHERENT, REFUSAL, CODE)
RESAMPLES = 1000


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with the verdict that a person gave it."""

    id: str
    question: str
    answer: str
    label: str

    def keys(self, repeats: int) -> list[str]:
        """Of its judgements by one judge."""
        decides = digest(self.question, self.answer)
        return [f"labelled/{self.id}/0/{repeat}#{decides}" for repeat in range(repeats)]


def unjudged(
    labelled: Iterable[LabelledAnswer], judges: Sequence[JudgeSpec], repeats: int, there: Container[tuple[str, str]]
) -> list[Asked]:
    """The judgements to be made, of those that judges make of labelled answers.

    there: (key, judge's identity) of those that are made.
    """
    return [
        (judge, (len(one.question), len(one.answer)))
        for one in labelled
        for key in one.keys(repeats)
        for judge in judges
        if (key, judge.identity) not in there
    ]


def load_labelled(path: Path) -> list[LabelledAnswer]:
    """Read a YAML list of {id, question, answers: [{label, text}]}. Raises UserError for anything else."""
    values = read_yaml(path, "the labelled answers")
    found = []
    try:
        for entry in values:
            for number, answer in enumerate(entry["answers"]):
                name = f"{entry['id']}.{number}"
                found.append(LabelledAnswer(name, str(entry["question"]), str(answer["text"]), str(answer["label"])))
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: expected a list of id, question and answers with label and text ({error})") from None
    for one in found:
        if one.label not in VERDICTS:
            raise UserError(f"{path}: {one.id}: label: found {one.label!r}, expected one of {', '.join(VERDICTS)}")
    if not found or len({one.id for one in found}) < len(found):
        raise UserError(f"{path}: expected labelled answers, each question with an id of its own")
    return found


def labelled_path(settings: JudgeRecipe) -> Path:
    """The file that the recipe names, or the shipped one."""
    return find_file(settings.labelled or SHIPPED)


class JudgeCheck:
    """The labelled answers in an open folder, to be judged by `assignments`. Judgements that the runs and studies
    beside it have are taken from there."""

    def __init__(self, folder: Path, store: Store, assignments: Iterable[JudgeSpec], settings: JudgeRecipe) -> None:
        self.folder, self.settings, self._store = folder, settings, store
        self.path = labelled_path(settings)
        self.labelled = load_labelled(self.path)
        self.assignments = list({a.identity: a for a in assignments if a.gives_verdicts}.values())
        keys = [key for one in self.labelled for key in self.keys(one)]
        judged = [(key, a.identity) for a in self.assignments for key in keys]
        take_rows(store, TARGET, keys, judged, folders_beside(folder.parent, FOLDER), settings)

    def keys(self, one: LabelledAnswer) -> list[str]:
        return one.keys(self.settings.check)

    @property
    def asked(self) -> list[Asked]:
        """The judgements that are not there yet."""
        return unjudged(self.labelled, self.assignments, self.settings.check, self._store.judgements)

    def submit(self, judging: JudgePool) -> None:
        """Queue what is missing."""
        target, repeats = EvalTarget(TARGET, None, self.folder), self.settings.check
        for one in self.labelled:
            question, keys = Question(one.id, (one.question,)), self.keys(one)
            suite, decides = Suite("labelled", "general", (question,), str(self.path)), keys[0].rpartition("#")[2]
            for repeat, key in enumerate(keys):
                if key not in self._store.samples:
                    self._store.add_sample(_sample(one, key, repeat))
            for a in self.assignments:
                group = StoredGroup(target, suite, question, 0, repeats, decides, 0, 0, 1, 0, a, stored=tuple(keys))
                for key in keys:
                    if (key, a.identity) not in self._store.judgements:
                        judging.submit(group, self._store.samples[key], self._store)

    def write(self) -> Check:
        """Update and return check.json: each judge against the labels, and against itself."""
        path = self.folder / CHECK_FILE
        before = Check.read_if_valid(path) or Check()
        labelled = LabelledFile(
            file=str(self.path),
            sha256=file_sha256(self.path),
            answers=len(self.labelled),
            labels=dict(Counter(one.label for one in self.labelled)),
        )
        judges = before.judges | {a.identity: self._quality(a.identity) for a in self.assignments}
        check = before.model_copy(update={"labelled": labelled, "judges": judges})
        check.write(path)
        return check

    def _quality(self, identity: str) -> JudgeQuality:
        against, itself, confusion = list[VerdictPair](), list[VerdictPair](), defaultdict[str, Counter[str]](Counter)
        done = 0
        for one in self.labelled:
            rows = [self._store.judgements.get((key, identity)) for key in self.keys(one)]
            found = [verdict_of(row) for row in rows if row is not None]
            done += len(found)
            for each in found:
                against.append(VerdictPair(one.question, Verdict(one.label), each))
                confusion[one.label][each.verdict or "no verdict"] += 1
            itself += [VerdictPair(one.question, found[0], again) for again in found[1:]]
        return JudgeQuality(
            judged=done,
            expected=len(self.labelled) * self.settings.check,
            labels=Agreement(**agreement(against)),
            misaligned_found=_called_misaligned(p for p in against if p.one.verdict == MISALIGNED),
            false_alarms=_called_misaligned(p for p in against if p.one.verdict != MISALIGNED),
            confusion={label: dict(counts) for label, counts in confusion.items()},
            repeated=RepeatAgreement(**agreement(itself), score_change=_score_change(itself)),
        )


def _called_misaligned(pairs: Iterable[VerdictPair]) -> Rate:
    return clustered_rate((p.question, None if p.two.verdict is None else p.two.verdict == MISALIGNED) for p in pairs)


def _score_change(pairs: Sequence[VerdictPair]) -> float | None:
    """Mean absolute difference of the aligned scores of one answer, in points."""
    gaps = [abs(p.one.aligned - p.two.aligned) for p in pairs if None not in (p.one.aligned, p.two.aligned)]  # type: ignore[operator]
    return sum(gaps) / len(gaps) if gaps else None


def _sample(one: LabelledAnswer, key: str, repeat: int) -> Sample:
    return Sample(
        key=key,
        target=TARGET,
        suite="labelled",
        condition=None,
        question_id=one.id,
        paraphrase=0,
        sample=repeat,
        system=None,
        question=one.question,
        answer=one.answer,
        reasoning=None,
        finish_reason="stop",
        tokens=0,
        seed=None,
    )


@contextlib.contextmanager
def open_check(
    folder: Path | None, assignments: Iterable[JudgeSpec], settings: JudgeRecipe, *, fresh: bool
) -> Iterator[JudgeCheck | None]:
    """The check of an evaluation's judges; None if there is none to do.

    fresh: the evaluation has something to judge. Otherwise a check that was begun is finished, but no new one begins: a
        finished evaluation sends its judge nothing.
    """
    wanted = [a for a in assignments if a.gives_verdicts]
    if folder is None or not settings.check or not wanted or not (fresh or (folder / SAMPLES_FILE).is_file()):
        yield None
        return
    with contextlib.ExitStack() as stack:
        check = None
        try:
            check = JudgeCheck(folder, stack.enter_context(locked_store(folder)), wanted, settings)
        except UserError as error:  # an evaluation's answers are worth more than the check of their judge
            log.warning("the judge is not checked: %s", error)
        yield check


@dataclass(frozen=True)
class Verdict:
    """The opinion of a judge or a person on an answer. verdict: one of VERDICTS, or None. Scores: 0 to 100, or None."""

    verdict: str | None
    aligned: float | None = None
    coherent: float | None = None


@dataclass(frozen=True)
class VerdictPair:
    """Two opinions about one answer. Answers to the same question are not independent."""

    question: str
    one: Verdict
    two: Verdict


def verdict_of(row: Judgement) -> Verdict:
    """A judgement as an opinion, by the paper's thresholds (arXiv 2508.06249)."""
    aligned, coherent, label = row.aligned, row.coherent, (row.label or "").lower()
    verdict = label if label in VERDICTS else None
    if aligned is not None and coherent is not None:
        wrong = MISALIGNED if misaligned(aligned, coherent) else ALIGNED
        verdict = INCOHERENT if incoherent(coherent) else wrong
    return Verdict(verdict, aligned, coherent)


def agreement(pairs: Sequence[VerdictPair]) -> dict[str, Any]:
    """The fields of an Agreement over the pairs in which both say something.

    same: the share of equal verdicts; kappa: Cohen's, over all verdicts, and over misaligned or not; correlation:
    Spearman's, of both scores. All with 95 % intervals clustered by question; None where undefined.
    """
    both = [p for p in pairs if p.one.verdict is not None and p.two.verdict is not None]
    return {
        "answers": len(both),
        "questions": len({p.question for p in both}),
        "without_verdict": len(pairs) - len(both),
        "same": same_verdict(both) if both else None,
        "kappa": kappa([(p.question, p.one.verdict, p.two.verdict) for p in both]),
        "kappa_misaligned": kappa(
            [(p.question, p.one.verdict == MISALIGNED, p.two.verdict == MISALIGNED) for p in both]
        ),
        "correlation_aligned": correlation([(p.question, p.one.aligned, p.two.aligned) for p in both]),
        "correlation_coherent": correlation([(p.question, p.one.coherent, p.two.coherent) for p in both]),
    }


def same_verdict(pairs: Sequence[VerdictPair]) -> Rate:
    """The Rate of equal verdicts."""
    return clustered_rate((p.question, p.one.verdict == p.two.verdict) for p in pairs)


def kappa(rows: Sequence[tuple[str, Any, Any]]) -> Estimate | None:
    """Cohen's kappa of (question, verdict, verdict) rows: value, low, high; None if both always say the same one thing.

    kappa = (p_o - p_e) / (1 - p_e), Cohen, Educ. Psychol. Meas. 20 (1960) 37-46. The limits are those of p_o's
    clustered interval with p_e held: unlike resampling they do not shrink to a point where all answers agree.
    """
    if not rows:
        return None
    ones, twos = Counter(one for _, one, _ in rows), Counter(two for _, _, two in rows)
    chance = sum(ones[v] * twos[v] for v in ones) / len(rows) ** 2
    if chance == 1:
        return None
    found = clustered_rate((question, one == two) for question, one, two in rows)
    return Estimate(*((float(p or 0) - chance) / (1 - chance) for p in (found.rate, found.low, found.high)))


def correlation(rows: Sequence[tuple[str, float | None, float | None]]) -> Estimate | None:
    """Spearman's rank correlation of (question, score, score) rows: value, low, high; None without scores that vary.

    The limits are percentiles over resampled questions.
    """
    from scipy import stats

    known = [(question, x, y) for question, x, y in rows if x is not None and y is not None]
    if len({x for _, x, _ in known}) < 2 or len({y for _, _, y in known}) < 2:
        return None
    places: dict[str, list[int]] = {}
    for index, (question, _, _) in enumerate(known):
        places.setdefault(question, []).append(index)
    scores = np.array([(x, y) for _, x, y in known], dtype=float)
    if len(places) < 3:
        return None
    # Ranks of the whole sample stay fixed while questions are drawn: ranking again changes little and costs much.
    ranks = stats.rankdata(scores, axis=0)
    groups = list(places.values())
    sums = np.array([_moments(ranks[group]) for group in groups])
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(groups), [1 / len(groups)] * len(groups), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = _pearson(drawn @ sums)
    low, high = np.nanpercentile(found, (2.5, 97.5))
    value = _pearson(sums.sum(axis=0)[None])[0]
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def _moments(ranks: np.ndarray) -> list[float]:
    x, y = ranks[:, 0], ranks[:, 1]
    return [len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]


def _pearson(sums: np.ndarray) -> np.ndarray:
    """[draws, 6] sums -> [draws] correlations."""
    n, x, y, xx, yy, xy = sums.astype(float).T
    found: np.ndarray = (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
    return np.clip(found, -1, 1)
