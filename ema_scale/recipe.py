"""What a run is: one YAML recipe, validated before anything heavy is loaded.

A recipe may start from others (`extends:`), and the command line may override any field (`key.path=value`).
Later wins: `extends` in order, then the file, then the overrides. Mappings merge; lists are replaced whole.
A path that begins with ./ or ../ is relative to the file it stands in; any other value is left as typed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from ema_scale.config.layers import _anchor_paths, apply_overrides, read_layers
from ema_scale.config.sections import (
    WAYS,
    AdapterRecipe,
    DataRecipe,
    EvaluationRecipe,
    ModelRecipe,
    SeparateReference,
    TrainingRecipe,
    _Section,
)
from ema_scale.core.errors import UserError, explain
from ema_scale.defenses.base import Defense
from ema_scale.defenses.registry import parse as parse_defenses


class Recipe(_Section):
    """One run: model, data, adapter, training, defenses, reference, evaluation."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    output: str = "runs"
    model: ModelRecipe
    data: DataRecipe
    adapter: AdapterRecipe = AdapterRecipe()
    training: TrainingRecipe = TrainingRecipe()
    defenses: list[SerializeAsAny[Defense]] = []
    reference: Literal["auto", "adapter_off", "two_stream", "cached"] | SeparateReference = "auto"
    reference_runs: int = Field(
        1,
        ge=1,
        description="runs that read the same rows' reference, which a study counts: `auto` adds up their passes",
    )
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @model_validator(mode="before")
    @classmethod
    def _parse_defenses(cls, values: Any) -> Any:
        # Paths of recipe files are whole by now; those of the command line and of Python are from here, and stay so
        # wherever the recipe is written to.
        values = _anchor_paths(values, Path.cwd())
        # Defenses name their own class by `kind`; the registry (and its plugins) knows which.
        if isinstance(values, dict) and values.get("defenses") is not None:
            values = {**values, "defenses": parse_defenses(values["defenses"])}
        return values

    @field_validator("reference", mode="before")
    @classmethod
    def _one_form(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return SeparateReference.of(value)
        if isinstance(value, str) and value not in WAYS:
            raise ValueError(f"expected {', '.join(WAYS)} or {{kind: separate, model: ...}}")
        return value

    @field_serializer("defenses")
    def _dump_defenses(self, defenses: list[Defense]) -> list[dict[str, Any]]:
        return [{"kind": d.kind, **d.model_dump(mode="json")} for d in defenses]

    @property
    def run_path(self) -> Path:
        return Path(self.output) / self.name

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge and validate a recipe file.

    Raises UserError naming file and field for a missing file, bad YAML, an `extends` loop, an unknown key
    (with the nearest known one) or a value out of range.
    """
    return build_recipe(apply_overrides(read_layers(Path(path)), overrides), where=str(path))


def build_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate plain values as a Recipe. Raises UserError as `load_recipe` does."""
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {explain(problem, Recipe)}" for problem in error.errors())) from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
