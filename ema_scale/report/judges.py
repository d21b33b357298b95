"""What is known of the judges whose scores the report rests on: from judge_check/check.json beside the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ema_scale.evaluation.judges.assignment import SCORING
from ema_scale.evaluation.judging.calibration import FOLDER
from ema_scale.evaluation.records import CHECK_FILE, Check
from ema_scale.report.records import Run


def judge_quality(runs: Sequence[Run]) -> list[str]:
    """A line for each 0-100 judge, and for each two judges of the same answers; exact judges need none."""
    judges = {identity: None for run in runs for identity in str(run.summary.get("judge") or "").split(", ")}
    scoring = [identity for identity in judges if identity.partition(":")[0] in SCORING]
    checks = [c.to_json() for f in _folders(runs) if (c := Check.read_if_valid(f / FOLDER / CHECK_FILE)) is not None]
    lines = []
    for identity in scoring:
        found = next((c for check in checks if (c := _mapping(check.get("judges")).get(identity))), None)
        try:
            lines.append(f"{identity}: {_words(found)}" if found else f"{identity}: not checked (ema judge check)")
        except (KeyError, TypeError):
            lines.append(f"{identity}: its check cannot be read")
    for check in checks:
        for found in check.get("between") or ():
            try:
                lines.append(_between(found))
            except (KeyError, TypeError):
                lines.append("a comparison of two judges cannot be read")
    return list(dict.fromkeys(lines))


def _folders(runs: Sequence[Run]) -> list[Path]:
    return list(dict.fromkeys(folder for run in runs for folder in (run.path, run.path.parent)))


def _words(found: Mapping[str, Any]) -> str:
    labels, again = found["labels"], found["repeated"]
    parts = [
        f"{found['judged']:,} of {found['of']:,} judgements of labelled answers",
        f"same verdict as the label {_rate(labels['same'])}",
        f"kappa {_limits(labels['kappa'])}",
        f"misaligned ones found {_rate(found['misaligned_found'])}",
        f"false alarms {_rate(found['false_alarms'])}",
    ]
    if again["answers"]:
        parts.append(f"the same when asked again {_rate(again['same'])}, kappa {_limits(again['kappa'])}")
    return "; ".join(parts)


def _between(found: Mapping[str, Any]) -> str:
    return (
        f"{found['one']} and {found['two']} on {found['answers']:,} answers: same verdict {_rate(found['same'])}, "
        f"kappa {_limits(found['kappa'])}, of misaligned or not {_limits(found['kappa_misaligned'])}, rank correlation "
        f"of aligned scores {_limits(found['correlation_aligned'])}"
    )


def _rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None or rate["rate"] is None:
        return "–"
    return f"{100 * rate['rate']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def _limits(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
