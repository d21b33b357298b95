"""Which judge judges which question."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.assignment import assign
from ema_scale.evaluation.judges.openai import missing_judge_key

if TYPE_CHECKING:
    from ema_scale.config.sections import EvaluationRecipe


def missing_judge_key_on_node(recipes: Iterable[EvaluationRecipe], environment: Mapping[str, str]) -> str | None:
    """A variable that the evaluation of these recipes will need and that is set neither here nor in `environment`,
    which is what the place where they are evaluated adds. Suites that cannot be read are left to the evaluation.
    """
    from ema_scale.evaluation.suites import load_suites

    here = {**os.environ, **environment}
    # A study's runs are mostly asked alike, and reading their suites is what takes time.
    for settings in {recipe.model_dump_json(): recipe for recipe in recipes}.values():
        name = missing_judge_key(settings.judge, here)
        if name is None:
            continue
        with contextlib.suppress(UserError):
            suites = load_suites(settings)
            if any(assign(s, q, settings.judge).kind == "openai" for s in suites for q in s.questions):
                return name
    return None
