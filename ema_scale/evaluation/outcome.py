"""The summary of one target, written: what was asked of whom, the rates, and what is known of the judge."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ema_scale.evaluation.chat_reply import CONTENT_FILTER
from ema_scale.evaluation.gate import PASSED, gate
from ema_scale.evaluation.legacy import drop_rows
from ema_scale.evaluation.plan import Group
from ema_scale.evaluation.store import Store
from ema_scale.evaluation.summary import SCHEMA, Summary, score, summarise
from ema_scale.recipe import EvaluationRecipe
from ema_scale.rundir import atomic_write_json

log = logging.getLogger(__name__)


def write_summary(
    path: Path, facts: dict[str, Any], groups: Sequence[Group], store: Store, settings: EvaluationRecipe
) -> Summary:
    """Write and return the summary of the answers in `groups`.

    facts: name, model, adapter, sampler, superseded, seconds.
    """
    rows = score(groups, store)
    summary: Summary = {
        "schema": SCHEMA,
        **facts,
        "seed": settings.seed,
        "samples": sum(len(group.keys) for group in groups),
        **({"legacy": True} if settings.legacy else {}),
        **summarise(groups, drop_rows(rows) if settings.legacy else rows),
    }
    # Where every question is asked behind a prompt, nobody wants to know how the model is by itself.
    if facts["adapter"] is None and any(group.suite.condition is None for group in groups):
        summary["gate"] = gate(summary["metrics"]["general_misaligned"], settings.gate)
        log.log(logging.INFO if summary["gate"]["state"] == PASSED else logging.WARNING, summary["gate"]["text"])
    if filtered := summary["dropped"].get(CONTENT_FILTER):
        log.warning(
            "%s: the judge's content filter kept back %d of %d answers, which count in no rate; where these are the "
            "worst ones, the rates are too low",
            facts["name"],
            filtered,
            summary["samples"],
        )
    atomic_write_json(path, summary)
    return summary
