"""Write down what a finished study measured, for `ema recommend`: one entry per arm, with intervals and standing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.io import atomic_write_json
from ema_scale.planning.evidence import SCHEMA, STANDINGS
from ema_scale.report.aggregate import RunGroup, groups
from ema_scale.report.collect import collect
from ema_scale.report.records import Collection
from ema_scale.report.rules import FAILED, Standing, standing

DIGITS = 4


def studies_of(found: Collection, name: str, made: str) -> list[dict[str, Any]]:
    """One study per model: its arms in the report's order. An arm without answers outside the domain is left out."""
    every = groups(found)
    studies = []
    for model in dict.fromkeys(group.model for group in every):
        of_model = [group for group in every if group.model == model]
        base = next((g for g in of_model if g.base), None)
        none = next((g for g in of_model if g.undefended), None)
        arms = [_arm(g, none, base) for g in of_model if not g.base and g.metrics.get("general_misaligned")]
        studies.append({"name": name, "model": model, "made": made, "arms": arms})
    return studies


def _arm(group: RunGroup, none: RunGroup | None, base: RunGroup | None) -> dict[str, Any]:
    stands = standing(group, none, base) if none is not None and not group.undefended else None
    return {
        "label": group.label,
        "runs": len(group.runs),
        "tasks": len({run.task for run in group.runs}),
        "defenses": [dict(spec) for spec in group.runs[0].specs],
        "metrics": {
            name: [round(x, DIGITS) for x in (rate.rate, rate.low, rate.high)]
            for name, rate in group.metrics.items()
            if rate is not None
        },
        "standing": _standing(stands) if stands else None,
        "costs": [text.replace("\u00a0", " ") for text in stands.said(FAILED)] if stands else [],
    }


def _standing(stands: Standing) -> str:
    if stands.fails:
        return STANDINGS[3]
    return STANDINGS[0] if stands.keeps else STANDINGS[1] if stands.keeps_by_means else STANDINGS[2]


def write_evidence(runs: Sequence[Path], name: str, out: Path) -> int:
    """Replace the study `name` in the file `out`, and keep the others; how many arms were written.

    Raises UserError if no arm was measured.
    """
    fresh = studies_of(collect(runs), name, datetime.now(UTC).date().isoformat())
    count = sum(len(study["arms"]) for study in fresh)
    if not count:
        raise UserError(f"{name}: no run was evaluated outside its domain, so there is nothing to write down")
    kept = [study for study in read_json(out)["studies"] if study["name"] != name] if out.is_file() else []
    every = sorted([*kept, *fresh], key=lambda study: (study["name"], study["model"]))
    atomic_write_json(out, {"schema": SCHEMA, "studies": every})
    return count
