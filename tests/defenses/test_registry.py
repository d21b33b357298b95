"""Defenses as configuration: positional arguments, errors for people, the catalogue, plugins."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ema_scale.defenses
from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, Defense, Interleaving, catalogue, parse
from ema_scale.defenses.registry import built_in, load, plugins
from ema_scale.recipe import build_recipe
from tests.training.helpers import make_trainer, tiny_peft


def test_positional_arguments_fill_fields_in_order():
    assert KL(0.3) == KL(strength=0.3)
    assert Interleaving("safe.jsonl", 0.25) == Interleaving(source="safe.jsonl", fraction=0.25)


def test_parse_takes_mappings_names_and_objects():
    assert parse([{"kind": "kl", "strength": 0.2}, "kl", KL(1)]) == [KL(0.2), KL(), KL(1)]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"kind": "kll"}], r"defenses\.0: unknown defense 'kll'; did you mean 'kl'"),
        (
            [KL(), {"kind": "kl", "strenght": 1}],
            r"defenses\.1: unknown key 'strenght'; did you mean 'strength'",
        ),
        ([{"kind": "kl", "strength": -0.1}], r"strength: expected a number of at least 0; found -0\.1"),
        ([{"kind": "kl", "strength": float("nan")}], r"strength: .*found nan"),
        ([{"kind": "kl", "direction": "forward"}], r"direction: .*policy_reference.*found 'forward'"),
        ([{"kind": "interleaving"}], r"source: missing"),
        ([{"kind": "interleaving", "source": "x", "fraction": 1.5}], r"fraction: .*at most 1; found 1\.5"),
        ([{"strength": 1}], r"defenses\.0: .*expected a mapping with `kind`, such as {kind: kl, strength: 0.3}"),
        ([{"ldifs": 2}], r"expected a mapping with `kind`, such as {kind: ldifs, strength: 2}"),
        ({"kind": "kl"}, r"expected a list"),
    ],
)
def test_errors_name_field_and_suggest(entries, expected):
    with pytest.raises(UserError, match=expected):
        parse(entries)


def test_python_errors_are_user_errors_too():
    with pytest.raises(UserError, match="strength"):
        KL(-1)
    with pytest.raises(UserError, match="given twice"):
        KL(0.1, strength=0.2)  # type: ignore[misc]
    with pytest.raises(UserError, match="at most 5"):
        Interleaving("safe.jsonl", 0.05, {}, "all", 0.5, "extra")  # type: ignore[call-arg]


def test_catalogue_is_complete_and_json():
    entries = catalogue()
    assert [e["kind"] for e in entries] == sorted(built_in())
    assert all(e["summary"] and "arXiv" in e["source"] for e in entries)
    assert all(p["description"] and p["type"] for e in entries for p in e["parameters"])
    types = {(e["kind"], p["name"]): p["type"] for e in entries for p in e["parameters"]}
    assert types["steering", "at_layers"] == "auto | all | list of integer"
    assert types["ldifs", "at_layers"] == "spread | released | list of integer" and types["kl", "strength"] == "number"
    assert types["early_stopping", "source"] == "string | list of string | null"
    assert types["early_stopping", "keep"] == "last | last_below"
    json.dumps(entries)
    needs = {e["kind"]: (e["needs"], e["uses"]) for e in entries}
    assert needs["ceiling"] == (["bad rows", "a reference pass"], []) and needs["kl"] == (
        ["a reference pass"],
        ["safe rows"],
    )
    assert needs["steering"] == (["directions"], []) and needs["interleaving"] == (["safe rows"], [])


def test_what_a_defense_needs_follows_from_the_fields_that_are_filled():
    assert KL(0.3).needs == () and KL(0.3, prompts="safe.jsonl").needs == ("safe rows",)
    assert Interleaving("safe.jsonl").needs == ("safe rows",) and Custom().needs == ()


def test_every_file_with_a_kind_is_a_defense():
    assert {"kl", "ceiling", "early_stopping", "safelora", "steering"} <= set(built_in())
    for kind in built_in():
        assert load(kind).kind == kind


def test_a_new_defense_is_one_new_file(tmp_path, monkeypatch):
    """The one that CONTRIBUTING.md shows, word for word, dropped into the package."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "stay_close.py").write_text(re.search(r"```python\n(.*?class StayClose.*?)```", text, re.DOTALL)[1])
    monkeypatch.setattr(ema_scale.defenses, "__path__", [*ema_scale.defenses.__path__, str(tmp_path)])
    built_in.cache_clear()
    try:
        recipe = build_recipe(
            {
                "name": "n",
                "model": {"path": "m"},
                "data": {"train": "d"},
                "defenses": [{"kind": "stay_close", "strength": 3}],
            }
        )
        (entry,) = (e for e in catalogue() if e["kind"] == "stay_close")
        assert entry["parameters"][0]["description"] == "weight of the squared distance"
        trainer = make_trainer(tmp_path / "run", tiny_peft(spread=0.05), defenses=recipe.defenses, max_steps=2)
        trainer.train()
        assert trainer.state.log_history[0]["stay_close"] > 0
        weaker = make_trainer(tmp_path / "weaker", tiny_peft(spread=0.05), max_steps=2)
        weaker.train()
        assert trainer.state.log_history[0]["grad_norm"] != pytest.approx(weaker.state.log_history[0]["grad_norm"])
    finally:
        built_in.cache_clear()
        sys.modules.pop("ema_scale.defenses.stay_close", None)


class Custom(Defense):
    kind = "custom"
    size: int = 1


def test_a_plugin_is_found_by_its_entry_point(monkeypatch):
    from importlib import metadata

    point = metadata.EntryPoint("custom", f"{__name__}:Custom", "ema_scale.defenses")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    plugins.cache_clear()
    try:
        assert type(parse([{"kind": "custom", "size": 2}])[0]).__name__ == "Custom"
    finally:
        plugins.cache_clear()


def test_needs_reference_is_derived():
    assert KL().needs_reference and KL(0).needs_reference
    assert not Interleaving("x").needs_reference and not Custom().needs_reference


def test_imports_without_torch():
    code = "import sys, ema_scale.defenses as d; d.catalogue(); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
