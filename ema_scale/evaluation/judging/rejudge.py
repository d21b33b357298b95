"""Judge stored answers again: under another judge, other prompts or another threshold. No model is loaded.

Judgements lie beside each other in judgements.jsonl, told apart by the judge's identity, and each judge has a
summary of its own: `summary.json` for the one that the evaluation was run with, `summary_<judge>.json` for
others. Replies that are stored already are read again under a new threshold without a call.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ema_scale.config.layers import apply_overrides
from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe
from ema_scale.core.errors import UserError, explain
from ema_scale.core.hashing import digest
from ema_scale.evaluation.judges.assignment import EXACT
from ema_scale.evaluation.judging.pool import JudgePool, raise_if_judge_failed
from ema_scale.evaluation.manifest import read_manifest, stored_groups
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import SAMPLES_FILE, SUMMARY_FILE, Manifest, Sample, Summary
from ema_scale.evaluation.store import locked_store
from ema_scale.evaluation.suites import Suite
from ema_scale.evaluation.summary import write_summary

OURS = "evaluation.judge."


def eval_folders(path: Path) -> list[Path]:
    """Folders with answers in or below a run, a study or an evaluation folder. Raises UserError if there are none."""
    patterns = [f"{place}{SAMPLES_FILE}" for place in ("", "eval/", "*/eval/", "*/*/eval/")]
    found = sorted(file.parent for pattern in patterns for file in path.glob(pattern))
    if not found:
        raise UserError(f"{path}: found no answers (eval/samples.jsonl); `ema eval` makes them")
    return found


def rejudge(folder: Path, overrides: Sequence[str] = ()) -> Summary:
    """Judge the answers in `folder` (one evaluation's) by its own judge section with `overrides`; the summary.

    overrides: `evaluation.judge.key=value`. A kind given there also replaces the exact judges that questions name,
    but for benign ones, which have a right answer.

    Raises UserError for other overrides, a folder in use or without answers, as the judge does, and, when the summary
    is written, if it failed to judge any answer.
    """
    started = time.monotonic()
    asked = read_manifest(folder)
    settings = judge_settings(asked.settings, overrides)
    replaced = any(item.startswith(f"{OURS}kind=") for item in overrides)
    suites = _without_exact(asked.suites) if replaced and settings.judge.kind not in EXACT else asked.suites
    with locked_store(folder) as store:
        rows = store.present
        groups = stored_groups(asked.model_copy(update={"settings": settings}), rows, folder, suites)
        pairs = [(g, key) for g in groups for key in g.keys]
        missing = [(g, key) for g, key in pairs if (key, g.judge.identity) not in store.judgements]
        with JudgePool(settings.judge, len(pairs), len(pairs) - len(missing)) as judging:
            for group, key in missing:
                judging.submit(group, store.samples[key], store)
        store.flush()
        own = _judges(groups) == _own_judges(asked, rows, folder)
        path = folder / (SUMMARY_FILE if own else f"summary_{slug(_judges(groups))}.json")
        summary = write_summary(path, _facts(folder, asked, time.monotonic() - started), groups, store, settings)
        raise_if_judge_failed({str(folder): judging.silence(groups, store)})
        return summary


def judge_settings(settings: EvaluationRecipe, overrides: Sequence[str]) -> EvaluationRecipe:
    """`settings` with `evaluation.judge.key=value` overrides. Raises UserError for any other key."""
    for item in overrides:
        if not item.startswith(OURS):
            raise UserError(f"override {item!r}: judging again can only change {OURS}..., such as {OURS}model=...")
    values = apply_overrides({"evaluation": {"judge": settings.judge.model_dump(mode="json")}}, overrides)
    try:
        judge = JudgeRecipe.model_validate(values["evaluation"]["judge"])
    except ValidationError as error:
        raise UserError("\n".join(f"evaluation.judge: {explain(p, JudgeRecipe)}" for p in error.errors())) from None
    return settings.model_copy(update={"judge": judge})


def _without_exact(suites: Iterable[Suite]) -> tuple[Suite, ...]:
    def freed(suite: Suite) -> Suite:
        if suite.role == "benign":
            return suite
        questions = (replace(q, judge=None) if q.judge in EXACT else q for q in suite.questions)
        return replace(suite, questions=tuple(questions))

    return tuple(map(freed, suites))


def _judges(groups: Iterable[PromptGroup]) -> list[str]:
    return sorted({group.judge.identity for group in groups})


def _own_judges(asked: Manifest, rows: Sequence[Sample], folder: Path) -> list[str]:
    """The judges that the evaluation was run with; none if it never had any, such as one from a result CSV."""
    try:
        return _judges(stored_groups(asked, rows, folder, asked.suites))
    except UserError:
        return []


def slug(identities: Sequence[str]) -> str:
    """A file name for judges: readable, and different for different ones."""
    text = "+".join(identities)
    plain = re.sub(r"[^A-Za-z0-9.@+-]+", "_", text).strip("_")
    return plain if len(plain) <= 60 else f"{plain[:50]}_{digest(text)[:8]}"


def _facts(folder: Path, asked: Manifest, seconds: float) -> dict[str, Any]:
    """What a summary says apart from rates, from the evaluation's own if it was finished."""
    before = Summary.read_if_valid(folder / SUMMARY_FILE)
    return {
        "name": asked.target,
        "model": asked.model,
        "adapter": asked.adapter,
        "sampler": before.sampler if before else {},
        "superseded": before.superseded if before else 0,
        "seconds": round(seconds, 3),
    }
