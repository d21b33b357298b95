"""Contrastive system prompts, as data, and as conditions under which questions are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ema_scale.core.errors import UserError
from ema_scale.core.paths import find_file
from ema_scale.evaluation.suites import Condition

POSITIVE, NEGATIVE = "positive", "negative"


@dataclass(frozen=True)
class Personas:
    """System prompts that ask for a trait and, the n-th for the n-th, for its opposite."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, POSITIVE: list(self.positive), NEGATIVE: list(self.negative)}


def load_personas(path: Path | str) -> Personas:
    """Read a YAML mapping of `positive` and `negative` to as many texts each.

    Raises UserError for a missing file, other keys, or lists of different lengths.
    """
    try:
        values = yaml.safe_load(find_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the personas ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict) or set(values) != {POSITIVE, NEGATIVE}:
        found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{path}: found {found}, expected the keys {POSITIVE} and {NEGATIVE}")
    for name, prompts in values.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise UserError(f"{path}: {name}: expected a list of system prompts")
    if len(values[POSITIVE]) != len(values[NEGATIVE]):
        raise UserError(
            f"{path}: found {len(values[POSITIVE])} positive and {len(values[NEGATIVE])} negative prompts, "
            "expected as many: they are paired in order"
        )
    return Personas(tuple(values[POSITIVE]), tuple(values[NEGATIVE]), str(path))


def conditions(personas: Personas) -> list[Condition]:
    """Every prompt as a condition of the evaluator: `positive-0`, `positive-1`, ..., `negative-0`, ..."""
    return [
        Condition(f"{side}-{number}", system=prompt)
        for side, prompts in ((POSITIVE, personas.positive), (NEGATIVE, personas.negative))
        for number, prompt in enumerate(prompts)
    ]
