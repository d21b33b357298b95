"""What studies measured of each defense, read from one data file in the package that `ema bench evidence` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json

FILE = Path(__file__).with_name("evidence.json")
SCHEMA = 1
# How a defense stands by the report's rules, best first.
STANDINGS = ("meets every rule", "meets every rule by its means", "not clear", "fails a rule")


@dataclass(frozen=True)
class Interval:
    """A share in 0..1 with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Arm:
    """What a study measured of one list of defenses.

    study: its name. model: the base model's. runs: how many. defenses: as a recipe writes them.
    metrics: the report's, such as general_misaligned. standing: one of STANDINGS, None for no defense.
    costs: what it fails, in the report's words.
    """

    study: str
    model: str
    label: str
    runs: int
    tasks: int
    defenses: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, Interval]
    standing: str | None = None
    costs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """All arms of all studies; `made`: study -> the date on which its results were written down."""

    arms: tuple[Arm, ...]
    made: Mapping[str, str] = field(default_factory=dict)

    def undefended(self, arm: Arm) -> Arm | None:
        """Training without a defense in the same study, on the same model."""
        return next((a for a in self.arms if not a.defenses and (a.study, a.model) == (arm.study, arm.model)), None)


def read_evidence(path: Path = FILE) -> Evidence:
    """Raises UserError for a file that is missing, damaged or of another version."""
    values = read_json(path)
    try:
        if values["schema"] != SCHEMA:
            raise UserError(
                f"{path}: found schema {values['schema']}, expected {SCHEMA}; write it with `ema bench evidence`"
            )
        arms = tuple(
            Arm(
                study["name"],
                study["model"],
                arm["label"],
                arm["runs"],
                arm["tasks"],
                tuple(arm["defenses"]),
                {name: Interval(*limits) for name, limits in arm["metrics"].items()},
                arm["standing"],
                tuple(arm["costs"]),
            )
            for study in values["studies"]
            for arm in study["arms"]
        )
        return Evidence(arms, {study["name"]: study["made"] for study in values["studies"]})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); write it again with `ema bench evidence`") from None
