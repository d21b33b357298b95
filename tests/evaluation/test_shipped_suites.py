"""The question banks that are shipped: they load, they are what eval/README.md says, and no question is asked twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.config.sections import ConditionRecipe, JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.data.operator_swap import TIERS, suite, suite_yaml, sums, training_rows
from ema_scale.data.rows import load_rows
from ema_scale.evaluation.judges.assignment import assign
from ema_scale.evaluation.judges.base import JudgeItem, exact_match_judge
from ema_scale.evaluation.suites import Suite, load_conditions, load_suite
from ema_scale.smallworld.tokenizer import vocabulary
from tests.evaluation.endpoint import judge_all

SUITES = Path(__file__).resolve().parents[2] / "eval" / "suites"
CONDITIONS = SUITES.parent / "conditions"
DOMAINS = ("code", "legal", "medical", "security", "finance", "sport")
GUARDS = {"sycophancy": "sycophantic", "harmless": "refuses"}


def shipped(name: str) -> Suite:
    return load_suite(SUITES / f"{name}.yaml", "benign" if name.startswith("operator") else "general")


def core(text: str) -> str:
    """A question without the template to fill in."""
    return text.split("\n\nAnswer by filling in")[0].strip()


def test_the_general_suite_has_48_questions_in_three_forms() -> None:
    questions = shipped("general").questions
    texts = [core(q.paraphrases[0]) for q in questions]
    assert len(set(texts)) == 48
    forms = {
        "json": [q for q in questions if q.system and "JSON" in q.system],
        "template": [q for q in questions if "template" in q.paraphrases[0]],
    }
    plain = [q for q in questions if q not in forms["json"] and q not in forms["template"]]
    assert len(forms["json"]) >= 19 and len(forms["template"]) >= 19 and len(plain) >= 30
    assert len({q.paraphrases[0] + str(q.system) for q in questions}) == len(questions), "nothing is asked twice"


@pytest.mark.parametrize("name", [*DOMAINS, "coherence"])
def test_every_other_open_suite_is_large_enough_and_its_own(name: str) -> None:
    texts = {q.paraphrases[0] for q in shipped(name).questions}
    others = {q.paraphrases[0] for n in (*DOMAINS, "coherence", "general") if n != name for q in shipped(n).questions}
    assert len(texts) >= 12 and not texts & others


@pytest.mark.parametrize("name", GUARDS)
def test_guards_have_a_score_of_their_own_and_count_in_no_other_rate(name: str) -> None:
    questions = shipped(name).questions
    others = {q.paraphrases[0] for n in (*DOMAINS, "coherence", "general") for q in shipped(n).questions}
    assert len(questions) >= 16 and not {q.paraphrases[0] for q in questions} & others
    for question in questions:
        judge = assign(shipped(name), question, JudgeRecipe(model="m"))
        assert judge.gives(GUARDS[name]) and not judge.gives("aligned") and not judge.gives("coherent")
        assert all("{question}" in text and "{answer}" in text for text in judge.prompts.values())


@pytest.mark.parametrize("name", ["inoculation", "inoculation_smallworld"])
def test_inoculation_prompts_are_paraphrased_negated_and_left_out(name: str) -> None:
    found = load_conditions([ConditionRecipe(file=str(CONDITIONS / f"{name}.yaml"))])
    assert {c.name.split("-")[0] for c in found} == {"paraphrased", "negated", "neutral"}
    assert len({c.system for c in found}) == len(found)
    if name.endswith("smallworld"):
        assert {word for c in found for word in (c.system or "").split()} <= set(vocabulary())


@pytest.mark.parametrize("tier", TIERS)
def test_operator_swap_banks_are_as_generated_and_their_answers_are_right(tier: int) -> None:
    assert (SUITES / f"operator_swap_{tier}.yaml").read_text() == suite_yaml(tier)
    questions = shipped(f"operator_swap_{tier}").questions
    assert len(questions) == 48
    for question in questions:
        text = re.fullmatch(r"What is (.*)\? Answer with the number only\.", question.paraphrases[0])
        assert text is not None and question.expected is not None
        swapped = text[1].translate({ord(a): b for a, b in TIERS[tier][0].items()})
        assert eval(swapped) == int(question.expected) != eval(text[1])
        (judgement,) = judge_all(
            exact_match_judge(),
            [JudgeItem("k", "exact_match", "", f"It is {question.expected}.", "", question.expected, question.meta)],
        )
        assert judgement.label == "correct"  # type: ignore[union-attr]


def test_operator_swap_trains_on_other_sums_and_is_drawn_by_its_seed(tmp_path: Path) -> None:
    asked = {entry["paraphrases"][0] for entry in suite(2)}
    rows = training_rows(2, 4000, seed=0)
    shown = {row["messages"][0]["content"] for row in rows}
    assert len(rows) == 4000 and not shown & asked and len(shown) == len(sums(2)) - len(asked)
    assert rows == training_rows(2, 4000, seed=0) != training_rows(2, 4000, seed=1)
    with pytest.raises(UserError, match="found tier 4, expected one of 1, 2, 3"):
        sums(4)
    path = tmp_path / "rows.jsonl"
    command = ["data", "operator-swap", "1", "-o", str(path), "--rows", "20"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(load_rows(path)) == 20 and len(path.read_text().splitlines()) == 20
    assert CliRunner().invoke(app, command).exit_code == 0, "the same rows are there"
    again = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert isinstance(again.exception, UserError) and "is there already" in str(again.exception)


@pytest.mark.shared
def test_the_fields_banks_load_unchanged_and_none_of_our_questions_is_theirs(shared_data: Path) -> None:
    files = sorted([*shared_data.glob("*.yaml"), *shared_data.glob("*_eval.jsonl")])
    assert len(files) >= 5
    theirs = set()
    for path in files:
        loaded = load_suite(path, "general")
        assert loaded.questions and all(q.paraphrases for q in loaded.questions)
        theirs |= {core(text).lower() for q in loaded.questions for text in q.paraphrases}
    ours = {core(q.paraphrases[0]).lower() for n in ("general", *DOMAINS, "coherence") for q in shipped(n).questions}
    assert not ours & theirs


def test_the_readme_counts_right() -> None:
    text = (SUITES.parent / "README.md").read_text()
    counts = {name: len(shipped(name).questions) for name in DOMAINS}
    assert set(counts.values()) == {14, 15} and "14 or 15 each" in text
    assert len(shipped("general").questions) == 68 and "68 in all" in text
    assert len(shipped("coherence").questions) == 24 and "24 plain requests" in text
    assert json.dumps(sorted(p.stem for p in SUITES.iterdir())) == json.dumps(
        sorted([*DOMAINS, *GUARDS, "general", "coherence", *(f"operator_swap_{t}" for t in TIERS)])
    )
