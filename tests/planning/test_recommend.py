"""`ema recommend`: only what the user can run, ranked by what a study measured, in lines that a recipe takes."""

import json

import pytest
import yaml

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, Ceiling, parse
from ema_scale.defenses.registry import known
from ema_scale.planning.evidence import STANDINGS, read_evidence
from ema_scale.planning.recommend import OUTSIDE, owned_by, recommend
from ema_scale.planning.show_advice import advice_lines
from ema_scale.recipe import build_recipe
from tests.tiny import save_tiny


def arm(label, standing, outside, *defenses):
    metrics = {OUTSIDE: [outside, outside - 0.01, outside + 0.01], "benign_learned": [0.8, 0.7, 0.9]}
    costs = ["hides misalignment"] if standing == STANDINGS[3] else []
    found = {"label": label, "runs": 9, "tasks": 3, "defenses": list(defenses), "metrics": metrics}
    return found | {"standing": standing, "costs": costs}


ON_PROMPTS = {"kind": "kl", "strength": 0.3, "prompts": "theirs", "temperature": 1.0}
ARMS = (
    arm("No defense", None, 0.8),
    arm("Pair", STANDINGS[0], 0.02, ON_PROMPTS, {"kind": "ceiling", "strength": 1.0, "source": ["theirs"]}),
    arm("KL on prompts", STANDINGS[0], 0.05, ON_PROMPTS),
    arm("LDIFS", STANDINGS[2], 0.01, {"kind": "ldifs", "strength": 1.0}),
    arm("KL", STANDINGS[3], 0.30, {"kind": "kl", "strength": 0.1}),
    arm("Another's", STANDINGS[0], 0.011, {"kind": "of_a_plug_in"}),
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recommend")
    study = {"name": "ours", "model": "tiny", "made": "2026-01-01", "arms": ARMS}
    (folder / "evidence.json").write_text(json.dumps({"schema": 1, "studies": [study]}))
    model = save_tiny(folder / "model")

    def recipe(*defenses, **training):
        values = {"name": "n", "model": {"path": model}, "data": {"train": "d.jsonl"}, "training": training}
        return build_recipe(values | {"defenses": list(defenses)})

    return recipe, read_evidence(folder / "evidence.json")


def labels(advice):
    return [one.evidence.label for one in advice.ranked]


def test_only_what_the_user_has_and_in_order(setting):
    recipe, evidence = setting
    nothing = recommend(recipe(), evidence, {})
    assert labels(nothing) == ["LDIFS", "KL"]
    assert nothing.missing["ceiling"] == ("bad rows",) and nothing.missing["steering"] == ("directions",)
    everything = recommend(recipe(), evidence, {"safe rows": "mine.jsonl", "bad rows": ["a.jsonl", "b.jsonl"]}, count=9)
    assert labels(everything) == ["Pair", "KL on prompts", "LDIFS", "KL"]
    pair = everything.ranked[0]
    assert [spec.get("prompts") or spec["source"] for spec in pair.defenses] == ["mine.jsonl", ["a.jsonl", "b.jsonl"]]
    assert pair.price > everything.ranked[1].price > everything.ranked[2].price > 1
    assert labels(recommend(recipe(), evidence, {"safe rows": "m"}, count=1)) == ["KL on prompts"]
    assert "KL on prompts" not in labels(recommend(recipe(), evidence, {"safe rows": "m"}, budget=1.1))
    unmeasured = {one.defenses[0]["kind"] for one in everything.unmeasured}
    assert {"treft", "interleaving"} <= unmeasured <= known().keys()
    assert not unmeasured & {"kl", "ldifs", "ceiling", "early_stopping", *everything.missing}


def test_what_two_studies_measured_is_listed_once_as_the_less_favourable_found_it(setting, tmp_path):
    recipe, _ = setting
    worse = {
        "name": "theirs",
        "model": "tiny",
        "made": "2026-01-02",
        "arms": [ARMS[0], arm("LDIFS", STANDINGS[2], 0.03, ARMS[3]["defenses"][0] | {"detached": False})],
    }
    better = {"name": "ours", "model": "tiny", "made": "2026-01-01", "arms": ARMS}
    file = tmp_path / "evidence.json"
    for studies in ([worse, better], [better, worse]):
        file.write_text(json.dumps({"schema": 1, "studies": studies}))
        ranked = recommend(recipe(), read_evidence(file), {}).ranked
        assert [(one.evidence.label, one.evidence.study) for one in ranked] == [("LDIFS", "theirs"), ("KL", "ours")]


def test_the_recipes_own_files_count_and_its_defenses_do_not(setting):
    recipe, evidence = setting
    own = recipe({"kind": "interleaving", "source": "safe.jsonl"})
    assert owned_by(own) == {"safe rows": "safe.jsonl"}
    found, plain = (recommend(r, evidence, {"safe rows": "safe.jsonl"}) for r in (own, recipe()))
    assert found.ranked[0].price == plain.ranked[0].price and labels(found)[0] == "KL on prompts"


def test_what_the_recipe_forbids_is_refused_with_the_reason(setting):
    recipe, evidence = setting
    base = {"unaligned base model": "b"}
    assert "asft" not in recommend(recipe(), evidence, base).refused
    assert "shard" in recommend(recipe(fsdp=True), evidence, base).refused["asft"]
    finished = recommend(recipe(), evidence, base, finished=True)
    assert not finished.ranked and [one.defenses[0]["kind"] for one in finished.unmeasured] == ["safelora"]


def test_the_lines_can_be_pasted_and_name_their_evidence(setting, tmp_path):
    recipe, evidence = setting
    owned = {"safe rows": "my safe: rows.jsonl", "bad rows": "b.jsonl"}
    lines = list(advice_lines(recommend(recipe(), evidence, owned, count=9), evidence, owned))
    text = "\n".join(lines)
    assert "1. Pair: meets every rule" in text and "4. KL: fails a rule" in text and "but it hides misalignment" in text
    assert "evidence: study ours of 2026-01-01, tiny, 9 runs on 3 tasks" in text
    assert "misaligned outside the domain: 2 % [1, 3] (no defense 80 %)" in text
    entries = [yaml.safe_load(line.strip().removeprefix("- ")) for line in lines if line.startswith("     - {")]
    first, second, *_ = parse(entries)
    assert isinstance(first, KL) and first.prompts == "my safe: rows.jsonl"
    assert isinstance(second, Ceiling) and second.source == "b.jsonl"
    assert entries[0] == {"kind": "kl", "strength": 0.3, "prompts": "my safe: rows.jsonl"}
    assert {"kind": "ldifs", "strength": 1.0} in entries
    assert "No safe rows?" not in text
    without = list(advice_lines(recommend(recipe(), evidence, {}), evidence, {}, model="mine"))
    assert "No safe rows? Let the aligned model write some: ema data synthesize mine -o safe.jsonl" in without
    advice = recommend(recipe(), evidence, {"unaligned base model": "b"}, finished=True)
    after = list(advice_lines(advice, evidence, {}, adapter=tmp_path, model="mine"))
    assert f"   ema safelora {tmp_path} --base b --aligned mine" in after


def test_the_file_in_the_package_is_sound_and_every_arm_is_a_defense():
    evidence = read_evidence()
    assert any(not arm.defenses for arm in evidence.arms) and evidence.made
    for one in evidence.arms:
        parse(one.defenses)
        assert OUTSIDE in one.metrics and one.runs and evidence.undefended(one) is not None
        assert (one.standing in STANDINGS) == bool(one.defenses)
        assert all(0 <= rate.low <= rate.value <= rate.high <= 1 for rate in one.metrics.values())


@pytest.mark.parametrize(("text", "told"), [("{}", "damaged"), (json.dumps({"schema": 9, "studies": []}), "schema 9")])
def test_a_file_that_is_not_evidence_is_refused(tmp_path, text, told):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(UserError, match=told):
        read_evidence(tmp_path / "e.json")
