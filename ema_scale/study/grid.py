"""A study: one recipe crossed with models, tasks, defenses and seeds, or a list of parts of that grid.

A study file:

    name: demo
    recipe: ../recipes/smallworld.yaml     # relative to this file
    models: {small: {model: {path: ...}}, ...}                                 # optional; each merged over the recipe
    tasks: {medical: {data: {train: ...}, evaluation: {suites: {...}}}, ...}   # each merged over that
    defenses: {none: [], kl: [{kind: kl, strength: {each: [0.1, 0.3]}}], ...}  # this one is kl-0.1 and kl-0.3
    seeds: [0, 1, 2]
    retries: 1                                                                 # of a run that fails; without it: none
    only: [{tasks: [medical]}, {defenses: [none, kl-0.3], seeds: [0]}]         # optional; without it: the whole grid
    prepare: [{run: [ema, train, ../recipes/x.yaml], makes: runs/x/adapter}]   # run first, where it is not there yet
    relearn: [8, 16, 32, 64]           # then go on from each defended adapter, without its defense, for so many rows
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ema_scale.config.layers import apply_overrides, merge, read_layers
from ema_scale.core.errors import UserError, explain
from ema_scale.core.numbers import CountOrZero, Seed
from ema_scale.core.paths import find_file
from ema_scale.core.text import one_line
from ema_scale.recipe import Recipe, build_recipe
from ema_scale.study.prepare import Preparation
from ema_scale.study.relearn import Relearning

# Of a recipe's fields those that a study sets for every run itself, and what of the study file to change instead.
_OWN = {"name": "name", "output": "output", "seed": "seeds", "defenses": "defenses"}


class Part(BaseModel):
    """A part of the grid. What is left out is taken in full."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str] | None = Field(None, min_length=1, description="Names of models.", examples=[["small"]])
    tasks: list[str] | None = Field(None, min_length=1, description="Names of tasks.", examples=[["medical"]])
    defenses: list[str] | None = Field(None, min_length=1, description="Names of arms.", examples=[["none", "kl-0.3"]])
    seeds: list[Seed] | None = Field(None, min_length=1, description="Seeds.", examples=[[0]])


class Study(BaseModel):
    """A grid of runs: one recipe x models x tasks x defenses x seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_hints: ClassVar[dict[str, str]] = {
        "strengths": "give the defense a list of values: {kind: kl, strength: {each: [0.1, 0.3]}}",
        "training": "put it into the recipe, or into an entry of `models` or `tasks`",
        "evaluation": "put it into the recipe, or into an entry of `models` or `tasks`",
    }

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="The study's name. Its runs are in output/name.",
        examples=["mine"],
    )
    title: str | None = Field(None, description="The report's heading.", examples=["My study"])
    recipe: str = Field(description="The recipe of all runs, relative to this file.", examples=["own.yaml"])
    output: Annotated[str, AfterValidator(one_line)] = Field("runs", description="The folder that holds the study.")
    models: dict[str, dict[str, Any]] = Field(
        {}, description="Name -> recipe keys of each model.", examples=[{"small": {"model": {"path": "m"}}}]
    )
    tasks: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Name -> recipe keys of each task, set over those of the model.",
        examples=[{"medical": {"data": {"train": "rows.jsonl"}}}],
    )
    defenses: dict[str, list[dict[str, Any]]] = Field(
        min_length=1,
        description="Name -> defenses of each arm. `{each: [...]}` in place of a value makes one arm per value.",
        examples=[{"none": [], "kl": [{"kind": "kl", "strength": {"each": [0.1, 0.3]}}]}],
    )
    seeds: list[Seed] = Field([0], min_length=1, description="One run per seed.", examples=[[0, 1, 2]])
    retries: CountOrZero = Field(
        0, le=1000, description="How often a failed run is tried again, from its newest checkpoint."
    )
    only: list[Part] = Field(
        [], description="Parts of the grid to run. Empty: all of it.", examples=[[{"tasks": ["medical"]}]]
    )
    prepare: list[Preparation] = Field(
        [],
        description="Commands to run first, each where the file or folder that it makes is missing.",
        examples=[[{"run": ["ema", "train", "x.yaml"], "makes": "runs/x/adapter"}]],
    )

    relearn: Relearning | None = Field(
        None,
        description="Go on from each defended adapter without its defense, for so many of the task's rows: does "
        "misalignment come back? A list of numbers, or `{rows: ..., epochs: ..., source: ...}`.",
        examples=[[8, 16, 32, 64]],
    )

    @field_validator("relearn", mode="before")
    @classmethod
    def _numbers_alone(cls, value: Any) -> Any:
        return {"rows": value} if isinstance(value, list) else value

    @field_validator("defenses")
    @classmethod
    def _spread(cls, defenses: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        arms: dict[str, list[dict[str, Any]]] = {}
        origin: dict[str, str] = {}
        for name, specs in defenses.items():
            for arm, of_arm in expand_grid(name, specs):
                if arm in arms:
                    raise UserError(f"defenses: {origin[arm]} and {name} both make an arm {arm}: rename one of them")
                arms[arm], origin[arm] = of_arm, name
                if len(arms) > MOST_ARMS:
                    raise ValueError(f"{name}: expected at most {MOST_ARMS:,} arms; found more, too many for one study")
        return arms

    @model_validator(mode="after")
    def _known_names(self) -> Study:
        for i, part in enumerate(self.only):
            for axis in ("models", "tasks", "defenses"):
                for name in getattr(part, axis) or ():
                    if name not in getattr(self, axis):
                        known = ", ".join(getattr(self, axis)) or "none"
                        raise UserError(f"only.{i}.{axis}: {name!r} is none of the study's {axis} ({known})")
        return self

    @model_validator(mode="after")
    def _one_name_a_run(self) -> Study:
        made: dict[str, tuple[str, str, str, int]] = {}
        for name, cell in zip(self.names(), self.cells(), strict=True):
            if name in made:
                one, other = (", ".join(filter(None, c[:3])) for c in (made[name], cell))
                raise UserError(f"({one}) and ({other}) both make a run {name}: rename a model, task or defense")
            made[name] = cell
        return self

    @property
    def path(self) -> Path:
        return Path(self.output) / self.name

    @property
    def heading(self) -> str:
        """The report's."""
        return self.title or f"Study: {self.name}"

    def runs(self, overrides: tuple[str, ...] = ()) -> list[Recipe]:
        """One validated recipe for every model x task x defense x seed, named model-task-defense-s<seed>.

        Without models the names begin with the task. Overrides are applied to each. Raises UserError naming the run
        and the field, and for overrides of what makes the runs different ones.
        """
        for item in overrides:
            own = item.partition("=")[0].split(".")[0]
            if own in _OWN:
                raise UserError(
                    f"override {item!r}: a study sets every run's {own} itself; change `{_OWN[own]}` in its file"
                )
        base = read_layers(Path(self.recipe))
        validated: dict[tuple[str, str, str], tuple[Recipe, str | None]] = {}  # once for all seeds
        recipes = []
        for name, (*cell, seed) in zip(self.names(), self.cells(), strict=True):
            model, task, defense = key = (cell[0], cell[1], cell[2])
            if key not in validated:
                values = merge(merge(base, self.models.get(model, {})), self.tasks[task])
                values = merge(values, {"name": name, "seed": seed, "output": str(self.path)})
                values["defenses"] = self.defenses[defense]
                recipe = build_recipe(apply_overrides(values, overrides), where=f"study {self.name}, run {name}")
                validated[key] = recipe, _reference(recipe)
            recipe, shared = validated[key]
            recipes.append((recipe, shared, {"name": name, "seed": seed}))
        readers = Counter(shared for _, shared, _ in recipes)
        return [
            recipe.model_copy(update=own if shared is None else {**own, "reference_runs": readers[shared]})
            for recipe, shared, own in recipes
        ]

    def names(self) -> list[str]:
        """The runs' names, in order, which are their folders' below `path`."""
        return ["-".join(filter(None, (m, task, defense, f"s{seed}"))) for m, task, defense, seed in self.cells()]

    def run_names(self) -> list[str]:
        """`names`, and those of the runs that relearning makes of them, which there may be."""
        again = self.relearn
        return [*self.names(), *(one for name in self.names() for one in (again.names(name) if again else ()))]

    def cells(self) -> list[tuple[str, str, str, int]]:
        """(model, task, defense, seed) of every run, in order."""
        cells = (
            itertools.product(
                part.models or self.models or [""],
                part.tasks or self.tasks,
                part.defenses or self.defenses,
                part.seeds or self.seeds,
            )
            for part in self.only or [Part()]
        )
        return list(dict.fromkeys(itertools.chain.from_iterable(cells)))


def _reference(recipe: Recipe) -> str | None:
    """What runs must have alike to read one cached reference; None if this one reads none. Rows that a defense mixes in
    may differ: most rows are the task's."""
    if not any(defense.needs_reference for defense in recipe.defenses):
        return None
    # Which layers are read, told on a model of some depth.
    layers = sorted({layer for defense in recipe.defenses for layer in defense.penalty_layers(48)})
    whole = recipe.to_dict()
    return json.dumps([whole["model"], whole["data"], whole["adapter"]["start"], whole["reference"], layers])


def is_study(path: Path) -> bool:
    """Whether a YAML file is a study's, and not a recipe's. Raises UserError if it is neither."""
    return "tasks" in read_layers(path)


def load_study(path: Path | str) -> Study:
    """Read and validate a study file. Raises UserError naming file and field."""
    path = find_file(path)
    values = read_layers(path)
    if isinstance(values.get("recipe"), str):
        values["recipe"] = str(find_file(values["recipe"], path.parent).resolve())
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {explain(p, Study)}" for p in error.errors())) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def write_study(study: Study, path: Path) -> None:
    """Keep the study beside its runs. A file that says the same is left as it is, with its date."""
    from ema_scale.core.files import read_text
    from ema_scale.core.io import atomic_write_text

    text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if not path.exists() or read_text(path) != text:
        atomic_write_text(path, text)


# Arms' names are in the names of folders, which have an end.
LONGEST = 40
MOST_ARMS = 10_000


def expand_grid(name: str, specs: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(arm, its defenses) for every combination of values. Raises ValueError if `each` is no list of unequal values."""
    for i, spec in enumerate(specs):
        for field, value in spec.items():
            if isinstance(value, Mapping) and set(value) == {"each"}:
                where, values = f"{name}.{i}.{field}.each", value["each"]
                if not isinstance(values, list) or not values:
                    raise ValueError(f"{where}: expected a list of values")
                if twice := [one for n, one in enumerate(values) if one in values[:n]]:
                    raise ValueError(f"{where}: {twice[0]!r} stands there twice")
                for one, slug in zip(values, slugs(values), strict=True):
                    yield from expand_grid(f"{name}-{slug}", [*specs[:i], {**spec, field: one}, *specs[i + 1 :]])
                return
    yield name, specs


def slugs(values: Sequence[Any]) -> list[str]:
    """What of each value goes into a folder's name, none twice.

    A number or word is itself. Of a path it is the last part, or as many as tell it from the others; of a text its
    beginning. A digest of the value follows where that is cut, or does not tell two apart.
    """
    texts = [str(value) for value in values]
    parts = [1] * len(texts)
    while True:
        found = [_slug(text, n) for text, n in zip(texts, parts, strict=True)]
        counts = Counter(found)
        deepest = [len(PurePosixPath(text).parts) for text in texts]
        longer = [i for i, slug in enumerate(found) if counts[slug] > 1 and parts[i] < deepest[i]]
        if not longer:
            break
        for i in longer:
            parts[i] += 1
    cut = [slug if slug == text else slug[:LONGEST].strip("-") for slug, text in zip(found, texts, strict=True)]
    counts = Counter(cut)
    return [
        slug if slug and slug == whole and counts[slug] == 1 else _with_digest(slug, text)
        for slug, whole, text in zip(cut, found, texts, strict=True)
    ]


def _with_digest(slug: str, text: str) -> str:
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".strip("-")


def _slug(text: str, parts: int) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]+", text):
        return text
    if "/" in text:
        text = "/".join(PurePosixPath(text).parts[-parts:])
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")
