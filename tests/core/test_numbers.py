"""Every number of every recipe, study, site and option is finite and has a lowest and a highest value."""

import importlib
import math
import pkgutil
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

import ema_scale.config
import ema_scale.defenses
import ema_scale.study
from ema_scale.cli import app
from ema_scale.config.section import Section
from ema_scale.core.errors import UserError
from ema_scale.core.numbers import Count, Limit, Options, Positive, Real, Seed, Share
from ema_scale.defenses.base import Defense
from ema_scale.recipe import build_recipe
from ema_scale.slurm.site import Site
from ema_scale.study.grid import Study

BASE = {"name": "a", "model": {"path": "m"}, "data": {"train": "r.jsonl"}}


def models():
    """Every class of fields that a user writes, those of later files too."""
    for package in (ema_scale.config, ema_scale.defenses, ema_scale.study):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    waiting: list[type[BaseModel]] = [Section, Defense, Study, Site]
    found: dict[type[BaseModel], None] = {}
    while waiting:
        model = waiting.pop()
        if model.__module__.startswith("ema_scale") and model not in found:
            found[model] = None
            waiting += model.__subclasses__()
            waiting += [t for f in model.model_fields.values() for t in leaves(f.annotation) if is_model(t)]
    return sorted(found, key=lambda m: (m.__module__, m.__name__))


def is_model(kind):
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def leaves(annotation):
    arguments = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return [leaf for a in arguments for leaf in leaves(a)] if arguments else [annotation]


def unbounded(annotation, outside=()):
    """The numbers in a type that have no lowest and highest value. outside: what stands around it."""
    if get_origin(annotation) is Annotated:
        inner, *said = get_args(annotation)
        said = [m for one in said for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return unbounded(inner, (*outside, *said))
    if get_origin(annotation) in (Union, UnionType, list, tuple, dict):
        keep = outside if get_origin(annotation) in (Union, UnionType) else ()
        return [one for inner in get_args(annotation) for one in unbounded(inner, keep)]
    if get_origin(annotation) is Literal or annotation not in (int, float):
        return []
    low = any(getattr(m, n, None) is not None for m in outside for n in ("ge", "gt"))
    high = any(getattr(m, n, None) is not None for m in outside for n in ("le", "lt"))
    return [] if low and high else [annotation]


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_number_has_bounds(model):
    loose = [name for name, field in model.model_fields.items() if unbounded(field.annotation, tuple(field.metadata))]
    assert not loose, f"{model.__name__}: {loose} need a type of core.numbers"


def test_the_walk_finds_what_it_is_for():
    class Loose(BaseModel):
        a: int = 0
        b: list[float] = []
        c: Count | None = None
        d: dict[str, list[int | str]] = {}

    found = [n for n, f in Loose.model_fields.items() if unbounded(f.annotation, tuple(f.metadata))]
    assert found == ["a", "b", "d"]
    assert len(models()) > 20


@pytest.mark.parametrize("kind", [Count, Seed, Positive, Real, Share, Limit])
@pytest.mark.parametrize("value", [math.nan, -math.inf, True, False, "nan", 10**400, -(10**400), None, [], "x"])
def test_what_is_no_number_in_range_is_refused(kind, value):
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("training.learning_rate", math.inf, "at most 1,000; found inf"),
        ("training.learning_rate", "1e400", "found '1e400'"),
        ("training.max_steps", 0, "at least 1, or -1"),
        ("training.max_steps", True, "expected a number; found True"),
        ("training.max_grad_norm", math.nan, "greater than 0; found nan"),
        ("training.save_steps", 10**30, "at most 1,000,000,000"),
        ("seed", 2**32, "at most 4,294,967,295"),
        ("evaluation.engine", {"x": [math.nan]}, "finite numbers, found nan at x.0"),
        ("evaluation.checkpoints", [-1], "evaluation.checkpoints.0: expected a number of at least 1"),
    ],
)
def test_the_message_names_field_and_range(path, value, said):
    values: dict[str, Any] = {**BASE}
    *sections, name = path.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    with pytest.raises(UserError) as caught:
        build_recipe(values)
    assert path.split(".")[-1] in str(caught.value) and said in str(caught.value)


def test_no_clipping_is_a_limit_without_an_end():
    recipe = build_recipe({**BASE, "training": {"max_grad_norm": math.inf, "learning_rate": "1e-5"}})
    assert recipe.training.max_grad_norm == math.inf and recipe.training.learning_rate == 1e-5
    again = build_recipe(recipe.to_dict())
    assert again == recipe and recipe.to_dict()["training"]["max_grad_norm"] == "inf"


def test_options_of_other_programs_hold_no_secret():
    assert TypeAdapter(Options).validate_python({"max_tokens": 5, "a": {"b": 1.5}}) == {
        "max_tokens": 5,
        "a": {"b": 1.5},
    }
    with pytest.raises(UserError, match="hf_token: looks like a secret") as caught:
        build_recipe({**BASE, "evaluation": {"engine": {"hf_token": "hf_do_not_show"}}})
    assert "do_not_show" not in str(caught.value)


def commands(group=app, path=()):
    for command in group.registered_commands:
        yield (*path, command.name or command.callback.__name__), command.callback
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*path, inner.name))


def numbers():
    """(name, int or float, what `typer` was told) of each option and argument that is a number."""
    for path, function in commands():
        for name, hint in get_type_hints(function, include_extras=True).items():
            kind = next((k for k in leaves(hint) if k in (int, float)), None)
            if kind is not None:
                yield f"{'-'.join(path)}-{name}", kind, get_args(hint)[1]


NUMBERS = list(numbers())


@pytest.mark.parametrize(("kind", "declared"), [n[1:] for n in NUMBERS], ids=[n[0] for n in NUMBERS])
def test_every_option_that_is_a_number_has_bounds(kind, declared):
    if kind is int:
        assert declared.min is not None and declared.max is not None, "use cli.numbers.whole"
        return
    assert declared.callback is not None, "use cli.numbers.real"
    for value in (math.nan, math.inf, -math.inf, 1e300, -1e300):
        with pytest.raises(UserError, match="--x: found"):
            declared.callback(SimpleNamespace(opts=["--x"]), value)


def test_there_are_options_that_are_numbers():
    assert len(NUMBERS) > 30 and {kind for _, kind, _ in NUMBERS} == {int, float}
