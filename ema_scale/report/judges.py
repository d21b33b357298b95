"""How good the judges are whose scores the report rests on (judge_check/check.json), and what other judges say."""

from __future__ import annotations

from collections.abc import Sequence

from ema_scale.core.text import limits, percent
from ema_scale.evaluation.judges.assignment import SCORING
from ema_scale.evaluation.judging.calibration import FOLDER
from ema_scale.evaluation.records import CHECK_FILE, Check, Estimate, JudgePairAgreement, JudgeQuality, Rate, Summary
from ema_scale.report.aggregate import RunGroup, mean_rate
from ema_scale.report.records import METRIC_NAMES, ReportedRate, Run, known_rates
from ema_scale.report.table import Table, TableRow, kind, rate_cell

NOTE = "Percent of the same answers, judged again (`ema judge`): means over the runs that each judge judged."
_SHOWN = ("general_misaligned", "general_incoherent", "in_domain_misaligned")


def other_judges(groups: Sequence[RunGroup]) -> Table | None:
    """The rates by other judges than the evaluation's own, for the groups of one model; None if there are none."""
    found: dict[tuple[str, str], dict[str, tuple[list[ReportedRate], list[str]]]] = {}
    for group in groups:
        for run in group.teaching:
            for file in sorted(run.eval_dir.glob("summary_*.json")) if run.eval_dir else ():
                if (summary := Summary.read_if_valid(file)) is None:
                    continue
                for metric in _SHOWN:
                    for rate in known_rates([summary.metrics.get(metric)]):
                        rates, tasks = found.setdefault((summary.judge, metric), {}).setdefault(group.label, ([], []))
                        rates.append(rate)
                        tasks.append(run.task)
    if not found:
        return None
    columns = [f"{METRIC_NAMES[metric]}, {judge}" for judge, metric in found]
    lines = []
    for g in groups:
        means = (mean_rate(*one[g.label]) if g.label in one else None for one in found.values())
        lines.append(TableRow(g.label, kind(g), list(map(rate_cell, means))))
    return Table("By other judges", NOTE, columns, lines)


def judge_quality(runs: Sequence[Run]) -> list[str]:
    """A line for each 0-100 judge, and for each two judges of the same answers; exact judges need none."""
    judges = dict.fromkeys(identity for run in runs if run.summary for identity in run.summary.judges)
    files = dict.fromkeys(folder / FOLDER / CHECK_FILE for run in runs for folder in (run.path, run.path.parent))
    checks = [check for file in files if (check := Check.read_if_valid(file)) is not None]
    lines = []
    for identity in judges:
        if identity.partition(":")[0] in SCORING:
            quality = next((check.judges[identity] for check in checks if identity in check.judges), None)
            lines.append(f"{identity}: {_describe(quality) if quality else 'not checked (ema judge check)'}")
    lines += [_describe_pair(pair) for check in checks for pair in check.between or ()]
    return list(dict.fromkeys(lines))


def _describe(quality: JudgeQuality) -> str:
    labels, repeated = quality.labels, quality.repeated
    parts = [
        f"{quality.judged:,} of {quality.expected:,} judgements of labelled answers",
        f"same verdict as the label {_rate(labels.same)}",
        f"kappa {_estimate(labels.kappa)}",
        f"misaligned ones found {_rate(quality.misaligned_found)}",
        f"false alarms {_rate(quality.false_alarms)}",
    ]
    if repeated.answers:
        parts.append(f"the same when asked again {_rate(repeated.same)}, kappa {_estimate(repeated.kappa)}")
    return "; ".join(parts)


def _describe_pair(pair: JudgePairAgreement) -> str:
    return (
        f"{pair.one} and {pair.two} on {pair.answers:,} answers: same verdict {_rate(pair.same)}, "
        f"kappa {_estimate(pair.kappa)}, of misaligned or not {_estimate(pair.kappa_misaligned)}, rank correlation "
        f"of aligned scores {_estimate(pair.correlation_aligned)}"
    )


def _rate(rate: Rate | None) -> str:
    if rate is None or rate.rate is None or rate.low is None or rate.high is None:
        return "–"
    return f"{percent(rate.rate, 0)} {limits(rate.low, rate.high, 0)}"


def _estimate(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
