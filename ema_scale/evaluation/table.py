"""The rates of evaluated targets as a table for the terminal: what `ema eval` and `ema judge` end with."""

from __future__ import annotations

from collections.abc import Mapping

from ema_scale.core.text import limits, percent
from ema_scale.evaluation.records import Mean, Rate, Summary
from ema_scale.evaluation.stats.rates import METRICS

_NOTE = "percent of answers, with 95 % intervals over questions"


def rates_table(summaries: Mapping[str, Summary]) -> str:
    """One line per target and one column per criterion that a target was asked for; then what counts in no rate."""
    shown = [m for m in METRICS if any(s.metrics.get(m) is not None for s in summaries.values())]
    rows = [["", *(METRICS[m] for m in shown)]]
    rows += [[name, *(_cell(summary.metrics.get(m)) for m in shown)] for name, summary in summaries.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(_NOTE if shown else "no suite was asked")
    for name, summary in summaries.items():
        for suite, found in summary.per_suite.items():
            lines += [f"{name}: {score} in {suite}: {_points(mean)}" for score, mean in found.scores.items()]
        lines += [f"{name}: {count} of {summary.samples} answers in no rate: {why}" for why, count in _dropped(summary)]
        lines += [f"{name}: {note}" for note in summary.notes]
    return "\n".join(lines)


def _cell(rate: Rate | None) -> str:
    if rate is None:
        return "not asked"
    if rate.rate is None or rate.low is None or rate.high is None:
        return "no score"
    return f"{percent(rate.rate)} {limits(rate.low, rate.high)}"


def _points(mean: Mean) -> str:
    if mean.mean is None or mean.low is None or mean.high is None:
        return f"no score ({mean.dropped} answers)"
    return f"{mean.mean:.1f} points [{mean.low:.1f}, {mean.high:.1f}]"


def _dropped(summary: Summary) -> list[tuple[str, int]]:
    return sorted(summary.dropped.items(), key=lambda item: -item[1])
