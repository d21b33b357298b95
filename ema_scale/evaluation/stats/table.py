"""Rates of several targets as lines of text."""

from __future__ import annotations

from collections.abc import Mapping

from ema_scale.evaluation.records import Rate, Summary

METRICS = {
    "general_misaligned": "general misaligned",
    "general_incoherent": "general incoherent",
    "in_domain_misaligned": "in-domain misaligned",
    "in_domain_incoherent": "in-domain incoherent",
    "benign_learned": "benign learned",
}


def judged_table(summaries: Mapping[str, Summary]) -> str:
    """For each target its judge, its rates in percent with 95 % intervals, and what was dropped and why."""
    lines = []
    for name, summary in summaries.items():
        lines.append(f"{name}: {summary.samples} answers by {summary.judge}")
        for metric, words in METRICS.items():
            rate = summary.metrics.get(metric)
            if rate is not None:
                lines.append(f"  {words:<22}{percent(rate)}")
        for reason, count in summary.dropped.items():
            lines.append(f"  dropped {count}: {reason}")
    return "\n".join(lines)


def percent(rate: Rate) -> str:
    """A rate of a summary in words."""
    if rate.rate is None or rate.low is None or rate.high is None:
        return f"no answer has a score ({rate.dropped} dropped)"
    return f"{100 * rate.rate:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f}), n={rate.n}"
