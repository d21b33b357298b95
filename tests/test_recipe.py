"""Recipes: extends, overrides, and errors that name file and field."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ema_scale.core.errors import UserError
from ema_scale.defenses.interleaving import Interleaving
from ema_scale.defenses.kl import KL
from ema_scale.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = {"name": "run", "model": {"path": "m"}, "data": {"train": "rows.jsonl"}}


def write(path: Path, values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def test_defaults_are_the_papers(tmp_path):
    recipe = load_recipe(write(tmp_path / "r.yaml", MINIMAL))
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.rslora) == (32, 64, True)
    assert recipe.training.learning_rate == 1e-4 and recipe.training.warmup_steps == 5
    assert recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps == 16


def test_extends_merges_and_later_wins(tmp_path):
    write(tmp_path / "a.yaml", {**MINIMAL, "training": {"learning_rate": 1e-3, "num_train_epochs": 2}})
    write(tmp_path / "b.yaml", {"training": {"num_train_epochs": 3}})
    path = write(tmp_path / "sub" / "c.yaml", {"extends": ["../a.yaml", "../b.yaml"], "name": "c"})
    recipe = load_recipe(path)
    assert (recipe.name, recipe.training.learning_rate, recipe.training.num_train_epochs) == ("c", 1e-3, 3)


def test_extends_loop_is_an_error(tmp_path):
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(UserError, match="extends itself"):
        load_recipe(tmp_path / "a.yaml")


def test_dotted_paths_are_relative_to_their_file(tmp_path):
    write(tmp_path / "shared" / "a.yaml", {**MINIMAL, "data": {"train": "./rows.jsonl"}})
    recipe = load_recipe(write(tmp_path / "b.yaml", {"extends": "shared/a.yaml"}))
    assert recipe.data.sources == [str(tmp_path / "shared" / "rows.jsonl")]
    assert recipe.model.path == "m"


def test_overrides_reach_any_field(tmp_path):
    path = write(tmp_path / "r.yaml", {**MINIMAL, "defenses": [{"kind": "kl", "strength": 0.1}]})
    recipe = load_recipe(
        path, ["training.learning_rate=1e-5", "defenses.0.strength=0.3", "data.train=[a.jsonl, b.jsonl]"]
    )
    assert recipe.training.learning_rate == 1e-5
    assert recipe.defenses == [KL(0.3)]
    assert recipe.data.sources == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"training": {"learning_rat": 1}}, "training.learning_rat.*did you mean 'learning_rate'"),
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        ({"evaluation": {"judge": {"modell": "x"}}}, "did you mean 'model'"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate: .*greater than 0; found -1"),
        ({"adapter": {"dropout": 1.5}}, "adapter.dropout: .*less than 1"),
        ({"model": {}}, "model.path: missing"),
        ({"data": {"train": []}}, "data.train: expected a file"),
        ({"defenses": [{"kind": "kll"}]}, "kll.*kl"),
        ({"defenses": [{"kind": "kl", "strenght": 1}]}, "strenght.*strength"),
        ({"defenses": [{"kind": "kl", "strength": -1}]}, "strength.*-1"),
        ({"name": "../escape"}, "name: "),
    ],
)
def test_errors_name_the_field_and_suggest(tmp_path, values, expected):
    path = write(tmp_path / "r.yaml", {**MINIMAL, **values})
    with pytest.raises(UserError, match=expected) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [("training", "expected key=value"), ("name.x=1", "below a plain value"), ("defenses.2.strength=1", "index")],
)
def test_bad_overrides(tmp_path, override, expected):
    with pytest.raises(UserError, match=expected):
        load_recipe(write(tmp_path / "r.yaml", {**MINIMAL, "defenses": []}), [override])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1,\n"])
def test_files_that_are_no_recipe(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(path)


def test_yaml_round_trip(tmp_path):
    recipe = load_recipe(
        write(tmp_path / "r.yaml", {**MINIMAL, "defenses": [{"kind": "interleaving", "source": "safe.jsonl"}]})
    )
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_every_shipped_recipe_is_valid():
    shipped = sorted((ROOT / "configs").glob("models/*.yaml")) + sorted((ROOT / "configs").glob("recipes/*.yaml"))
    assert len(shipped) >= 9
    for path in shipped:
        recipe = load_recipe(
            path, ["model.path=m", "data.train=rows.jsonl"] if "paper" in path.name else ["data.train=x"]
        )
        assert isinstance(recipe, Recipe)


def test_reading_a_recipe_loads_nothing_heavy():
    code = (
        "import sys, ema_scale.recipe, ema_scale.planning.describe, ema_scale.data.rows\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'vllm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_path_from_the_command_line_stays_where_it_is_wherever_the_recipe_is_written(tmp_path, monkeypatch):
    (tmp_path / "one.yaml").write_text("name: one\nmodel: {path: m}\ndata: {train: ./rows.jsonl}\n")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    given = ["output=./out", "evaluation.suites.general=[../bank.yaml]",
             "defenses=[{kind: interleaving, source: ./safe.jsonl}]"]  # fmt: skip
    recipe = load_recipe(tmp_path / "one.yaml", given)
    written = tmp_path / "deep" / "down" / "recipe.yaml"
    written.parent.mkdir(parents=True)
    written.write_text(recipe.to_yaml())
    for found in (recipe, load_recipe(written)):
        assert found.run_path == here / "out" / "one" and found.data.sources == [str(tmp_path / "rows.jsonl")]
        assert found.evaluation.suites.general == [str(tmp_path / "bank.yaml")]
        (interleaving,) = found.defenses
        assert isinstance(interleaving, Interleaving) and interleaving.source == str(here / "safe.jsonl")
