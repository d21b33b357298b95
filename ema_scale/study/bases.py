"""Runs that one engine evaluates together, and the folder of the base model that is asked beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ema_scale.evaluation.asked import FILE
from ema_scale.locate import locate
from ema_scale.recipe import Recipe
from ema_scale.study.report.sources import model_label

# What decides neither an answer nor its judgement, or says only which of them are asked for.
_NOT_ASKED = {"suites", "conditions", "inoculation", "gate", "checkpoints", "compare_base"}
_NOT_JUDGED = {"budget_calls", "budget_tokens", "concurrency", "check", "labelled"}

Named = TypeVar("Named")
Together = list[tuple[Named, Recipe]]


def together(pairs: Iterable[tuple[Named, Recipe]], base_dir: Path) -> list[tuple[Path, Together[Named]]]:
    """Groups of one model and one way of evaluating, each with the folder of its base model: `base_dir`, or if that is
    another group's, `base_dir`-<model>-<digest>.

    A folder stays a group's whatever other groups there are, and in whatever order: it is known by its name, or by what
    it was asked (asked.json).
    """
    groups: dict[str, Together[Named]] = defaultdict(list)
    for name, recipe in pairs:
        settings = recipe.evaluation.model_dump(mode="json", exclude={"suites", "conditions", "inoculation"})
        groups[json.dumps([recipe.model.model_dump(mode="json"), settings], sort_keys=True)].append((name, recipe))
    found: list[tuple[Path, Together[Named]]] = []
    for group in groups.values():
        taken = {folder for folder, _ in found}
        found.append((_folder(group[0][1], base_dir, taken), group))
    return found


def asked_alike(one: Path, other: Path) -> bool:
    """Whether two evaluation folders were asked under the same settings, whatever the questions. False if that is not
    known."""
    settings = [_decisive(asked["settings"]) for folder in (one, other) if (asked := _asked(folder)) is not None]
    return len(settings) == 2 and settings[0] == settings[1]


def _folder(recipe: Recipe, base_dir: Path, taken: set[Path]) -> Path:
    own = _decisive(recipe.evaluation.model_dump(mode="json"))
    decides = json.dumps([recipe.model.model_dump(mode="json"), own], sort_keys=True)
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", model_label(recipe.model.path)).strip("-")[-40:]
    named = base_dir.with_name(f"{base_dir.name}-{slug}-{hashlib.sha256(decides.encode()).hexdigest()[:6]}")
    while named in taken:  # groups that differ in nothing that is asked
        named = named.with_name(f"{named.name}+")
    if named.is_dir():
        return named
    # `base`, and the base-1, base-2 of older versions.
    for folder in [base_dir, *sorted(base_dir.parent.glob(f"{base_dir.name}-[0-9]*"))]:
        asked = None if folder in taken else _asked(folder / "eval")
        if asked and asked["model"] == locate(recipe.model.path) and _decisive(asked["settings"]) == own:
            return folder
    free = base_dir not in taken and not (base_dir / "eval" / FILE).exists()
    return base_dir if free else named


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in _NOT_ASKED}
    kept["judge"] = {key: value for key, value in (kept.get("judge") or {}).items() if key not in _NOT_JUDGED}
    kept["endpoint"] = {key: value for key, value in (kept.get("endpoint") or {}).items() if key != "concurrency"}
    return kept


def _asked(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(found, dict) and isinstance(found.get("settings"), dict) and isinstance(found.get("model"), str)
    return found if known else None
