"""What a run is: one YAML recipe, validated before anything heavy is loaded. `config.layers` says how files merge."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from ema_scale.config.layers import anchor_paths, apply_overrides, read_layers
from ema_scale.config.section import Section
from ema_scale.config.sections import (
    WAYS,
    AdapterRecipe,
    DataRecipe,
    EvaluationRecipe,
    ModelRecipe,
    SeparateReference,
    TrainingRecipe,
)
from ema_scale.core.errors import UserError, explain_all
from ema_scale.core.numbers import Count, Seed
from ema_scale.core.paths import find_file
from ema_scale.core.text import one_line
from ema_scale.core.uri import scheme_of
from ema_scale.core.user_code import file_of
from ema_scale.defenses.base import Defense
from ema_scale.defenses.registry import parse as parse_defenses


class Recipe(Section):
    """One run: model, data, adapter, training, defenses, reference, evaluation."""

    arguments: ClassVar[Collection[str]] = ("seed",)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="The run's name. Its folder is output/name.",
        examples=["my-run"],
    )
    seed: Seed = Field(0, description="Seed of the adapter's start, the order of rows and what defenses draw.")
    output: Annotated[str, AfterValidator(one_line)] = Field("runs", description="The folder that holds run folders.")
    model: ModelRecipe = Field(description="The checkpoint to fine-tune.", examples=[{"path": "smallworld:aligned"}])
    data: DataRecipe = Field(description="The training rows.", examples=[{"train": "rows.jsonl"}])
    adapter: AdapterRecipe = Field(AdapterRecipe(), description="The LoRA adapter.")
    training: TrainingRecipe = Field(TrainingRecipe(), description="Optimisation.")
    defenses: list[SerializeAsAny[Defense]] = Field(
        [],
        description="The defenses, each with its kind and its own fields. Any list of them composes.",
        examples=[[{"kind": "kl", "strength": 0.3}]],
    )
    reference: Literal["auto", "adapter_off", "two_stream", "cached"] | SeparateReference = Field(
        "auto",
        description="How the frozen reference is computed. `auto`: the cheapest way that is exact. "
        "`{kind: separate, model: ...}`: another model is the reference.",
        examples=["cached"],
    )
    reference_runs: Count = Field(
        1,
        description="Runs that share one cached reference. A study counts them, and `auto` weighs costs by it.",
    )
    evaluation: EvaluationRecipe = Field(EvaluationRecipe(), description="Sampling and judging.")

    @model_validator(mode="before")
    @classmethod
    def _parse_defenses(cls, values: Any) -> Any:
        # Paths of recipe files are absolute by now. Those of the command line and of Python are relative to the
        # current folder, and must stay so wherever the recipe is written to.
        values = anchor_paths(values, Path.cwd())
        # A defense names its class by `kind`; only the registry knows which class that is.
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
        return [{"kind": d.defined_in or d.kind, **d.model_dump(mode="json")} for d in defenses]

    @property
    def run_path(self) -> Path:
        return Path(self.output) / self.name

    def missing_files(self) -> list[tuple[str, str]]:
        """(key, name) of each file or folder that this recipe names and that is not there.

        A text counts as a name if it has a suffix of such files or is written as a path. Hub ids do not.
        """
        values = {key: value for key, value in self.to_dict().items() if key not in ("name", "output")}
        return [
            (key, text)
            for key, text in _texts(values)
            if is_path(text) and ".engine." not in key and not find_file(file_of(text)).exists()
        ]

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)


_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".safetensors", ".jinja", ".txt", ".py"}


@functools.lru_cache(maxsize=4096)  # the runs of a study name the same files
def is_path(text: str) -> bool:
    """Whether a text in a recipe names a local file or folder, and not a hub id, a URL or words for the model."""
    text = file_of(text)
    if scheme_of(text) is not None or "://" in text or len(text.split()) != 1:
        return False
    written_as_path = text.startswith(("/", "./", "../", "~")) or text.count("/") > 1
    return written_as_path or Path(text).suffix.lower() in _SUFFIXES


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in plain values."""
    if type(value) is str:
        yield key, value
    elif type(value) is dict or type(value) is list:
        for name, inner in value.items() if type(value) is dict else enumerate(value):
            yield from _texts(inner, f"{key}.{name}" if key else str(name))


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
        raise UserError("\n".join(f"{where}: {problem}" for problem in explain_all(error, Recipe))) from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
