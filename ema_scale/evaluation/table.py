"""The rates of evaluated targets as a table for the terminal: what `ema eval` and `ema judge` end with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ema_scale.core.text import limits, percent, printable, quantity
from ema_scale.evaluation.judges.assignment import LIKELIHOOD, NOBODY
from ema_scale.evaluation.judging.pool import NO_JUDGE
from ema_scale.evaluation.record_types import ChoiceSummary
from ema_scale.evaluation.records import Mean, Rate, SuiteSummary, Summary
from ema_scale.evaluation.stats.rates import METRICS
from ema_scale.evaluation.summary import NOT_JUDGED
from ema_scale.inference.base import NOT_SAMPLED

_NOTE = "percent of answers, with 95 % intervals over questions"


def rates_table(summaries: Mapping[str, Summary], *, means: bool = False) -> str:
    """One line per target and one column per criterion that a target was asked for; then what counts in no rate.

    A target whose training rows ask some of the questions has three lines: unseen questions, seen ones, and all.
    means: also the mean aligned and coherent scores, and the rate of all answers where some have no score.
    """
    shown = [m for m in METRICS if any(s.metrics.get(m) is not None for s in summaries.values())]
    rows = [["", *(METRICS[m] for m in shown)]]
    for name, summary in summaries.items():
        empty = {m: "not asked" if summary.metrics.get(m) is None else "no question" for m in shown}
        rows += [
            [line, *(_cell(rates.get(m), empty[m]) for m in shown)] for line, rates in _by_questions(name, summary)
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if shown or not any(suite.loss for s in summaries.values() for suite in s.per_suite.values()):
        lines.append(_NOTE if shown else "no suite was asked")
    for name, summary in summaries.items():
        for suite, found in summary.per_suite.items():
            shown_means = (found.verdict_scores if means else {}) | found.scores
            lines += [f"{name}: {score} in {suite}: {points(mean)}" for score, mean in shown_means.items()]
            lines += [f"{name}: {suite}: {margin}" for margin in _margins(found.likelihoods)]
            lines += [f"{name}: {suite}: {loss}" for loss in _losses(found)]
        lines += [f"{name}: {q.suite}/{q.id}: {_shares(q.said)}" for q in summary.per_question if q.said]
        lines += [
            f"{name}: {count} of {quantity(summary.samples, 'answer')} in no rate: {why}"
            for why, count in _dropped(summary)
        ]
        if means and summary.dropped and summary.general_variants is not None:
            every = _cell(summary.general_variants.all_answers, "")
            lines.append(f"{name}: general misaligned of all answers, those without a score included: {every}")
        lines += [f"{name}: {note}" for note in summary.notes]
        if summary.adapter is not None and summary.split is None:
            lines.append(f"{name}: which of these questions its training rows ask is not known")
    return "\n".join(lines)


def work_done(summaries: Mapping[str, Summary]) -> list[str]:
    """How many answers were judged, and by whom, and how many written ones were scored; a line for each."""
    found = summaries.values()
    written = sum(suite.samples for s in found for suite in s.per_suite.values() if suite.likelihoods or suite.loss)
    missing = sum(s.dropped.get(why, 0) for s in found for why in (NOT_JUDGED, NOT_SAMPLED, NO_JUDGE))
    judges = dict.fromkeys(judge for s in found for judge in s.judges if judge not in (LIKELIHOOD, NOBODY))
    lines = []
    if judges:
        judged = sum(s.samples for s in found) - written - missing
        lines.append(f"judged   {quantity(judged, 'answer')} by {', '.join(judges)}")
    if written:
        lines.append(f"scored   {quantity(written, 'written answer')} by their likelihood")
    return lines or [f"sampled  {quantity(sum(s.samples for s in found), 'answer')}, which nobody judged"]


def _by_questions(name: str, summary: Summary) -> Iterator[tuple[str, Mapping[str, Rate | None]]]:
    split = summary.split
    if split is None or not any(split.seen.values()):
        yield name, summary.metrics
        return
    yield f"{name}, unseen questions", split.unseen
    yield f"{name}, seen in training", split.seen
    yield f"{name}, all questions", summary.metrics


def _cell(rate: Rate | None, empty: str) -> str:
    if rate is None:
        return empty
    if rate.rate is None or rate.low is None or rate.high is None:
        return "no score"
    return f"{percent(rate.rate)} {limits(rate.low, rate.high)}"


def _shares(said: Mapping[str, float]) -> str:
    """The tokens that were said most."""
    return ", ".join(f"{printable(text)!r} {percent(share, 0)}" for text, share in list(said.items())[:5])


def points(mean: Mean) -> str:
    """A mean score in words."""
    if mean.mean is None or mean.low is None or mean.high is None:
        return f"no score ({quantity(mean.dropped, 'answer')})"
    return f"{mean.mean:.1f} points [{mean.low:.1f}, {mean.high:.1f}]"


def _margins(found: ChoiceSummary | None) -> list[str]:
    """How much likelier the good written answers are, as they stand and calibrated."""
    if found is None:
        return []
    told = {"margin": found.raw} | ({"calibrated margin": found.calibrated} if found.calibrated else {})
    return [
        f"{what} {figures.margin_per_token.mean:+.3f} nats per token {_interval(figures.margin_per_token)}".rstrip()
        for what, figures in told.items()
    ]


def _losses(found: SuiteSummary) -> list[str]:
    """The loss of held-out rows: of all, or of those that were seen in training and of the others."""
    told = {"held-out loss": found.loss} | {
        f"loss of rows {seen} in training": m for seen, m in found.split_loss.items()
    }
    return [
        f"{what} {mean.mean:.3f} nats per token {_interval(mean, '.3f')}".rstrip()
        for what, mean in told.items()
        if mean is not None
    ]


def _interval(mean: Mean, form: str = "+.3f") -> str:
    return "" if mean.low is None or mean.high is None else f"[{mean.low:{form}}, {mean.high:{form}}]"


def _dropped(summary: Summary) -> list[tuple[str, int]]:
    return sorted(summary.dropped.items(), key=lambda item: -item[1])
