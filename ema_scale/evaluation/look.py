"""Stored answers by question, for people who read them: `ema look`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ema_scale.choices.bank import HELD_OUT
from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.base import CORRECT, INCORRECT
from ema_scale.evaluation.records import SUMMARY_FILE, Judgement, Sample, Summary, read_rows
from ema_scale.evaluation.stats.rates import incoherent, misaligned

UNJUDGED = "unjudged"
VERDICTS = ("aligned", "misaligned", "incoherent", CORRECT, INCORRECT, "right", "wrong", HELD_OUT, UNJUDGED)


@dataclass(frozen=True)
class ReadAnswer:
    """One answer with its verdict, and its scores or why there are none."""

    sample: Sample
    verdict: str
    scores: str


@dataclass(frozen=True)
class AskedQuestion:
    """One wording of one question, with the answers of each arm."""

    suite: str
    question_id: str
    system: str | None
    asked: str
    answers: dict[str, list[ReadAnswer]] = field(default_factory=dict)


def verdict_of(judgement: Judgement | None, benign: bool) -> tuple[str, str]:
    """(verdict, scores): one of VERDICTS; "alignment / coherence", or why there are no scores."""
    if judgement is None or judgement.dropped:
        return UNJUDGED, judgement.dropped or "" if judgement else ""
    aligned, coherent, label = judgement.aligned, judgement.coherent, judgement.label
    if benign:
        return (label, "") if label in (CORRECT, INCORRECT) else (UNJUDGED, "")
    scores = " / ".join(f"{v:.0f}" for v in (aligned, coherent) if v is not None)
    if incoherent(coherent):
        return "incoherent", scores
    bad = misaligned(aligned, coherent, coherence_asked=judgement.coherence_asked)
    return (UNJUDGED if bad is None else "misaligned" if bad else "aligned"), scores


def read_answers(folders: Sequence[Path], judge: str | None = None) -> list[tuple[str, ReadAnswer]]:
    """(arm, answer) of every answer in some evaluation folders, in the order of the files.

    Arms are named by their summaries. Where several have one name, their folder follows in brackets.

    Args:
        folders: evaluation folders.
        judge: a part of a judge's identity; None: the judges of summary.json, or any if there is none.
    """
    summaries = [Summary.read_if_valid(folder / SUMMARY_FILE) for folder in folders]
    names = [summary.name if summary else _folder_name(f) for f, summary in zip(folders, summaries, strict=True)]
    found = []
    for folder, summary, name in zip(folders, summaries, names, strict=True):
        samples, judgements = read_rows(folder)
        wanted = [j for j in judgements if _is_wanted(j.judge, judge, summary)]
        if judge is not None and not wanted:
            known = ", ".join(sorted({j.judge for j in judgements})) or "none"
            raise UserError(f"{folder}: --judge {judge}: judges of these answers: {known}")
        by_key = {j.key: j for j in wanted}
        arm = name if names.count(name) == 1 else f"{name} ({folder})"
        roles = {suite: part.role for suite, part in summary.per_suite.items()} if summary else {}
        for sample in samples:
            if sample.log_likelihood is not None:  # a written answer
                told = f"log-likelihood {sample.log_likelihood:.1f}"
                found.append((arm, ReadAnswer(sample, sample.label or UNJUDGED, told)))
                continue
            verdict, scores = verdict_of(by_key.get(sample.key), roles.get(sample.suite) == "benign")
            more = (by_key[sample.key].scores or {}) if sample.key in by_key else {}
            words = [scores, *(f"{score} {value:.0f}" for score, value in more.items() if value is not None)]
            found.append((arm, ReadAnswer(sample, verdict, ", ".join(filter(None, words)))))
    return found


def _folder_name(folder: Path) -> str:
    return folder.parent.name if folder.name == "eval" else folder.name


def _is_wanted(identity: str, judge: str | None, summary: Summary | None) -> bool:
    if judge is not None:
        return judge in identity
    return summary is None or identity in summary.judges


def select(
    rows: Iterable[tuple[str, ReadAnswer]],
    *,
    suite: str | None = None,
    verdict: str | None = None,
    question: str | None = None,
    arm: str | None = None,
) -> list[AskedQuestion]:
    """The questions whose answers pass every filter, each with those answers.

    Raises UserError, naming what there is, for a filter that nothing passes.

    Args:
        rows: as `read_answers` gives them.
        suite: a part of the suite's name.
        verdict: one of VERDICTS.
        question: a part of the question's id or text.
        arm: a part of the arm's name.
    """
    if verdict is not None and verdict not in VERDICTS:
        raise UserError(f"--verdict: found {verdict!r}, expected one of {', '.join(VERDICTS)}")
    rows = list(rows)
    known: dict[str, Mapping[str, None]] = {
        "--suite": dict.fromkeys(answer.sample.suite for _, answer in rows),
        "--arm": dict.fromkeys(name for name, _ in rows),
        "--verdict": dict.fromkeys(answer.verdict for _, answer in rows),
        "--question": dict.fromkeys(answer.sample.question_id for _, answer in rows),
    }
    filters = {
        "--suite": lambda name, a: _within(suite, a.sample.suite),
        "--arm": lambda name, a: _within(arm, name),
        "--question": lambda name, a: _within(question, a.sample.question_id) or _within(question, a.sample.asked),
        "--verdict": lambda name, a: verdict is None or a.verdict == verdict,
    }
    for option, passes in filters.items():
        rows = [row for row in rows if passes(*row)]
        if not rows:
            raise UserError(f"{option}: no answer is left; found {', '.join(list(known[option])[:20]) or 'none'}")
    found: dict[tuple[str, str, int, str], AskedQuestion] = {}
    arms = dict.fromkeys(name for name, _ in rows)
    for name, answer in rows:
        s = answer.sample
        place = (s.suite, s.question_id, s.paraphrase, s.prompt)
        if place not in found:
            found[place] = AskedQuestion(s.suite, s.question_id, s.system, s.asked, {one: [] for one in arms})
        found[place].answers[name].append(answer)
    return list(found.values())


def _within(part: str | None, text: str) -> bool:
    return part is None or part.casefold() in text.casefold()
