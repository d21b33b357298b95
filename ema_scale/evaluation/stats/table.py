"""Rates of several targets as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRICS = {
    "general_misaligned": "general misaligned",
    "general_incoherent": "general incoherent",
    "in_domain_misaligned": "in-domain misaligned",
    "in_domain_incoherent": "in-domain incoherent",
    "benign_learned": "benign learned",
}


def judged_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """For each target its judge, its rates in percent with 95 % intervals, and what was dropped and why."""
    lines = []
    for name, summary in summaries.items():
        lines.append(f"{name}: {summary['samples']} answers by {summary['judge']}")
        for metric, words in METRICS.items():
            rate = summary["metrics"][metric]
            if rate is not None:
                lines.append(f"  {words:<22}{percent(rate)}")
        for reason, count in summary["dropped"].items():
            lines.append(f"  dropped {count}: {reason}")
    return "\n".join(lines)


def percent(rate: Mapping[str, Any]) -> str:
    """A rate of a summary in words."""
    if rate["rate"] is None:
        return f"no answer has a score ({rate['dropped']} dropped)"
    share, low, high = (100 * rate[k] for k in ("rate", "low", "high"))
    return f"{share:.1f} % ({low:.1f} to {high:.1f}), n={rate['n']}"
