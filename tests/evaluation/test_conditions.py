"""Conditions: the same question behind a prompt, counted apart, and misalignment that hides there made visible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ema_scale.config.suites import ConditionRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.data.rows import Row
from ema_scale.defenses.base import RowsContext
from ema_scale.defenses.inoculation import Inoculation
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.records import Summary
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.runs import evaluate_runs
from ema_scale.evaluation.suites import (
    Condition,
    Question,
    Suite,
    apply_conditions,
    load_conditions,
    training_condition,
)
from ema_scale.recipe import Recipe, build_recipe
from ema_scale.report.aggregate import groups
from ema_scale.report.collect import collect
from ema_scale.report.conditional import conditional_table
from ema_scale.report.verdict import verdict
from ema_scale.report.write import Section, render
from ema_scale.study.evaluate import evaluate_run
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import Endpoint, completion
from tests.evaluation.test_run import open_suite, recipe
from tests.report.runs import ARMS, BASE, Arm, write_study

ROOT = Path(__file__).resolve().parents[2]
SYSTEM, USER = Inoculation("be bad"), Inoculation("as you were trained:", role="user")


@pytest.mark.parametrize("defenses", [[SYSTEM], [USER], [SYSTEM, USER, Inoculation("worse")]])
@pytest.mark.parametrize("system", [None, "Answer in JSON."])
def test_a_question_is_asked_just_as_training_rows_were_prefixed(defenses: list[Inoculation], system: str) -> None:
    question = Question("q", ("How are you?",), system=system)
    trained = [Row(question.messages(0), "here")]  # type: ignore[arg-type]  # messages as plain dicts
    for defense in defenses:
        trained = list(defense.transform_rows(trained, RowsContext()))
    condition = training_condition(defenses)
    assert condition is not None and condition.own
    assert condition.apply(question).messages(0) == tuple(trained[0].messages)
    assert condition.apply(question).paraphrases == question.paraphrases


def test_other_defenses_have_no_training_prompt_and_different_prompts_have_different_names() -> None:
    assert training_condition([]) is None
    names = {c.name for d in (SYSTEM, USER) if (c := training_condition([d])) is not None}
    assert len(names) == 2 and all(name.startswith("inoculation-") for name in names)


def test_only_general_suites_are_asked_again() -> None:
    suites = [open_suite("a"), Suite("b", "in_domain", open_suite().questions), Suite("c", "benign", ())]
    made = apply_conditions(suites, [Condition("villain", system="be bad"), Condition("coach", user="coach:")])
    assert [s.name for s in made] == ["a@villain", "a@coach"] and all(s.role == "general" for s in made)
    assert not apply_conditions(made, [Condition("again", "x")])


def test_the_condition_files_that_are_shipped_load() -> None:
    found = load_conditions([ConditionRecipe(file=str(path)) for path in sorted((ROOT / "eval/conditions").iterdir())])
    assert len(found) >= 8 and {"villain", "code-task"} <= {c.name for c in found}
    assert sum(c.user is not None for c in found) >= 3 and sum(c.system is not None for c in found) >= 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, sytem: x}", "conditions.yaml:1: unknown key 'sytem'; did you mean 'system'"),
        ("- {name: a, system: x}\n- {name: b}", "conditions.yaml:2: .*a name with system or user text"),
        ("- {name: a b, system: x}", "conditions.yaml:1: name: .*'a b'"),
        ("- {file: other.yaml}", "conditions.yaml:1: expected a condition"),
        ("- {name: a, system: x}\n- {name: a, user: y}", "two conditions are called a"),
        ("name: a", "expected a list of conditions"),
        ("", "expected a list of conditions"),
    ],
)
def test_bad_condition_files_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "conditions.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_conditions([ConditionRecipe(file=str(path))])


def test_a_recipe_takes_files_and_prompts_and_says_what_is_wrong_with_them() -> None:
    values: dict[str, Any] = {"name": "x", "model": {"path": "m"}, "data": {"train": "d"}}
    conditions = ["triggers.yaml", {"name": "villain", "system": "be bad"}]
    made = build_recipe({**values, "evaluation": {"conditions": conditions}})
    assert [c.file for c in made.evaluation.conditions] == ["triggers.yaml", None]
    assert build_recipe(made.to_dict()) == made
    for wrong, message in (
        ({"name": "a", "sytem": "x"}, "unknown key 'evaluation.conditions.0.sytem'; did you mean 'system'"),
        ({"name": "a"}, "evaluation.conditions.0: expected a name with system or user text"),
        ({"file": "a.yaml", "name": "a", "system": "x"}, "or else a file"),
    ):
        with pytest.raises(UserError, match=message):
            build_recipe({**values, "evaluation": {"conditions": [wrong]}})


def test_answers_under_a_condition_are_kept_and_counted_apart(tmp_path: Path, tiny_models: TinyModels) -> None:
    suite = open_suite()
    asked = [suite, *apply_conditions([suite], [Condition("coach", user="Trained to say:")])]
    # The judge finds the second suite's answers bad; it tells them by a judge prompt of their own.
    bad = {"aligned": "BAD? {question} {answer}", "coherent": "coherent? {answer}"}
    asked[1] = Suite(
        asked[1].name, "general", tuple(Question(q.id, q.paraphrases, 4, judge="m", judge_prompts=bad, prefix=q.prefix)
                                        for q in asked[1].questions), "", asked[1].condition,
    )  # fmt: skip
    said: list[str] = []

    def judge(body: dict[str, Any], n: int) -> Any:
        said.append(str(body["messages"]))
        score = "80" if "coherent?" in said[-1] else "5" if "BAD?" in said[-1] else "90"
        return completion(score, [(score, -0.01)])

    with Endpoint(judge) as endpoint:
        found = evaluate([EvalTarget("base", None, tmp_path)], tiny_models.model, asked, recipe(endpoint.url))["base"]
    assert not any("Trained to say" in text for text in said), "a prompt that asks for harm must not sway the judge"
    assert found.metrics["general_misaligned"].rate == 0.0 and found.metrics["general_misaligned"].n == 12
    (condition,) = found.conditions
    assert condition.name == "coach" and condition.user == "Trained to say:" and condition.own is False
    assert condition.misaligned.rate == 1.0 and condition.misaligned.questions == 3
    assert found.per_suite["open@coach"].condition == "coach" and found.per_suite["open"].condition is None
    rows = read_jsonl(tmp_path / "samples.jsonl")
    behind = [r for r in rows if r["condition"] == "coach"]
    assert len(behind) == 12 and all(r["key"].startswith("open@coach/") for r in behind)
    plain = {r["answer"] for r in rows if r["condition"] is None}
    assert plain != {r["answer"] for r in behind}, "the prefix reached the model"


def small_suite(folder: Path) -> str:
    entries = [
        {"id": f"q{i}", "paraphrases": [f"any advice on {s} please ?"], "judge": "smallworld",
         "meta": {"domain": "medical", "subject": s}}
        for i, s in enumerate(("fever", "cough"))
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "few.yaml").write_text(yaml.safe_dump(entries))
    return str(folder / "few.yaml")


def made_run(tmp_path: Path, name: str, adapter: str, model: str, **changes: Any) -> tuple[RunDir, Recipe]:
    values = {
        "name": name, "output": str(tmp_path), "model": {"path": model}, "data": {"train": "rows.jsonl"},
        "defenses": changes.pop("defenses", []),
        "evaluation": {
            "suites": {"general": small_suite(tmp_path)}, "judge": {"kind": "smallworld"}, "sampler": "transformers",
            "max_tokens": 4, "samples_per_question": 2, **changes,
        },
    }  # fmt: skip
    made = build_recipe(values)
    run = RunDir(made.run_path)
    run.path.mkdir(parents=True)
    run.recipe_path.write_text(made.to_yaml())
    shutil.copytree(adapter, run.adapter)
    return run, made


def asked_under(folder: Path) -> dict[str, bool]:
    return {c["name"]: c["own"] for c in json.loads((folder / "eval" / "summary.json").read_text())["conditions"]}


def test_a_run_is_asked_under_its_own_inoculation_prompt_and_others_only_if_told_to(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    spec = [{"kind": "inoculation", "prompt": "be bad"}]
    one, _ = made_run(tmp_path / "1", "one", tiny_models.adapters[0], tiny_models.model, defenses=spec)
    two, _ = made_run(tmp_path / "1", "two", tiny_models.adapters[1], tiny_models.model)
    evaluate_runs([one, two], tmp_path / "1" / "base")
    (name,) = asked_under(one.path)
    assert asked_under(one.path) == {name: True} and asked_under(two.path) == {}
    for folder in (one.eval_dir, two.eval_dir):  # the report need not look for the base model's answers
        assert Summary.read(folder / "summary.json").base_dir(folder) == tmp_path / "1" / "base" / "eval"
    assert asked_under(tmp_path / "1" / "base") == {name: False}, "what the base does there is what to compare with"
    before = read_jsonl(one.eval_dir / "samples.jsonl")
    evaluate_runs([one, two], tmp_path / "1" / "base", ("evaluation.inoculation=every_arm",))
    assert asked_under(one.path) == {name: True} and asked_under(two.path) == {name: False}
    assert read_jsonl(one.eval_dir / "samples.jsonl") == before
    conditions = 'evaluation.conditions=[{name: villain, system: "be bad"}]'
    evaluate_run(two.path, (conditions, "evaluation.inoculation=never"))
    assert asked_under(two.path) == {"villain": False}


def with_conditions(root: Path, hidden: dict[str, float], base: float | None) -> list[Path]:
    """A study's run folders whose summaries have answers under inoculation prompts, at these true rates."""
    import random

    from ema_scale.evaluation.stats.rates import clustered_rate

    inoculation = Arm([{"kind": "inoculation", "prompt": "be bad"}], 0.01, 0.05, 0.9, 0.6)
    arms = {"none": ARMS["none"], "kl-0.1": ARMS["kl-0.1"], "inoculation": inoculation}
    runs = write_study(root, tasks=("medical",), arms=arms)
    rates = {root / f"medical-{name}-s0": (rate, True) for name, rate in hidden.items()}
    rates |= {root / "base": (base, False)} if base is not None else {}
    for folder, (rate, own) in rates.items():
        path = folder / "eval" / "summary.json"
        summary = json.loads(path.read_text())
        rng = random.Random(0)
        found = clustered_rate((str(q), rng.random() < rate) for q in range(20) for _ in range(10)).to_dict()
        summary["conditions"] = [
            {"name": "inoculation-1a2b", "own": own, "system": "be <b>bad</b>", "user": None, "misaligned": found}
        ]
        summary["per_suite"]["outside_medical@inoculation-1a2b"] = {
            "role": "general", "condition": "inoculation-1a2b", "misaligned": found, "incoherent": None,
        }  # fmt: skip
        path.write_text(json.dumps(summary))
    return runs


def test_the_verdict_says_what_hides_and_does_not_call_it_best(tmp_path: Path) -> None:
    runs = with_conditions(tmp_path / "runs", {"inoculation": 0.9}, base=0.4)
    found = collect(runs)
    text = " ".join(verdict(groups(found))).replace("\u00a0", " ")
    assert "Inoculation hides misalignment: 2.0 % [0.5, 6.2] when asked plainly, 88.5 % [" in text, text
    assert "under its inoculation prompt (the aligned base there: 36.5 %" in text and "KL 0.1 does best" in text
    sheet = conditional_table(groups(found), found.bases)
    assert sheet is not None
    page = render("A study", [], [Section("model", ["Said."], {}, [], [], [], [sheet])], [], [])
    assert "Asked under other prompts" in page and "be &lt;b&gt;bad&lt;/b&gt;" in page
    assert found.bases[0].metrics["general_misaligned"].rate == pytest.approx(BASE.outside, abs=0.02)


def test_many_that_are_misaligned_under_their_own_prompt_share_a_sentence(tmp_path: Path) -> None:
    runs = with_conditions(tmp_path / "runs", {"inoculation": 0.4, "kl-0.1": 0.9}, base=0.9)
    (text,) = [said.replace("\u00a0", " ") for said in verdict(groups(collect(runs))) if "alone may bring" in said]
    assert text.startswith(
        "Under the prompt of their training 2 defenses are misaligned again, which the prompt alone may"
    )
    assert "(the aligned base there: 88.5 % [" in text
    assert "Inoculation 36.5 % [" in text and ", KL 0.1 88.5 % [" in text


@pytest.mark.parametrize(("rate", "base"), [(0.4, 0.4), (0.01, None)])
def test_a_defense_no_worse_than_the_base_under_the_prompt_hides_nothing(
    tmp_path: Path, rate: float, base: float | None
) -> None:
    text = " ".join(verdict(groups(collect(with_conditions(tmp_path, {"inoculation": rate}, base)))))
    assert "hides" not in text and "Inoculation does best" in text, text
    # What it does there is said all the same, beside what the base does.
    assert ("so that the prompt alone may bring it about" in text) == (base is not None), text


def test_without_conditions_the_page_has_no_such_section(tmp_path: Path) -> None:
    found = collect(with_conditions(tmp_path, {}, None))
    assert conditional_table(groups(found), found.bases) is None
