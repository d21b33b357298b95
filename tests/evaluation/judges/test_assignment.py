from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.assignment import assign
from ema_scale.evaluation.judges.base import (
    JudgeItem,
    exact_match_judge,
    last_number,
    smallworld_judge,
)
from ema_scale.evaluation.stats.rates import incoherent, misaligned
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.thoughts import split_reasoning
from ema_scale.smallworld import grammar
from tests.evaluation.endpoint import judge_all

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = str(ROOT / "eval" / "judges" / "aligned_coherent.yaml")


def assigned(question: dict[str, Any], role: Any = "general", **recipe: Any) -> Any:
    asked = Question(id="q", paraphrases=("?",), **question)
    return assign(Suite("s", role, (asked,)), asked, JudgeRecipe(**recipe))


def test_an_exact_judge_of_the_question_wins_over_the_recipe() -> None:
    assert assigned({"judge": "smallworld"}, kind="openai").identity == "smallworld"
    assert assigned({"judge": "exact_match", "expected": "4"}).identity == "exact_match"
    assert assigned({"expected": "4"}, role="benign").identity == "exact_match"


def test_the_recipes_model_wins_over_the_questions() -> None:
    prompts = {"aligned": "{answer}", "coherent": "{answer}"}
    named = assigned({"judge": "gpt-4o-mini", "judge_prompts": prompts})
    assert named.model == "gpt-4o-mini" and named.identity.startswith("openai:gpt-4o-mini#")
    local = assigned({"judge": "gpt-4o-mini", "judge_prompts": prompts}, model="local", base_url="http://x")
    assert local.model == "local"


def test_other_prompts_are_another_judge() -> None:
    ours = assigned({}, model="m", prompts=PROMPTS)
    other = assigned({"judge_prompts": {"aligned": "{answer}", "coherent": "{answer}"}}, model="m", prompts=PROMPTS)
    assert ours.identity != other.identity and set(ours.prompts) == {"aligned", "coherent"}


@pytest.mark.parametrize(
    ("question", "role", "recipe", "message"),
    [
        ({}, "general", {"model": "m"}, "has no judge_prompts; set evaluation.judge.prompts"),
        ({}, "general", {"prompts": PROMPTS}, "no judge model; set evaluation.judge.model"),
        ({"judge": "gpt-4"}, "general", {"kind": "smallworld"}, "takes evaluation.judge.kind: openai"),
        ({}, "benign", {"model": "m"}, "a benign question needs `expected`"),
        ({}, "general", {"kind": "exact_match"}, "it has no `expected`"),
        ({}, "general", {"model": "m", "prompts": "nowhere.yaml"}, "nowhere.yaml: cannot read"),
    ],
)
def test_a_question_that_cannot_be_judged_is_named(question: Any, role: Any, recipe: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        assigned(question, role, **recipe)


def test_one_judge_prompt_of_any_name_suffices() -> None:
    found = assigned({"judge_prompts": {"correct": "right? {answer}"}}, model="m")
    assert set(found.prompts) == {"correct"} and found.gives("correct") and not found.gives("aligned")
    assert not found.gives_verdicts and assigned({}, model="m", prompts=PROMPTS).gives_verdicts


def test_a_prompts_file_may_list_its_prompts(tmp_path: Path) -> None:
    file = tmp_path / "judges.yaml"
    file.write_text("- aligned: a {answer}\n- coherent: c {answer}\n- medical: m {answer}\n")
    assert list(assigned({}, model="m", prompts=str(file)).prompts) == ["aligned", "coherent", "medical"]
    file.write_text("- aligned: a {answer}\n- aligned: b {answer}\n")
    with pytest.raises(UserError, match="judge_prompts.aligned: occurs twice"):
        assigned({}, model="m", prompts=str(file))


@pytest.mark.parametrize(
    ("answer", "meta", "label"),
    [
        (" The  ANSWER is 4.\n", {}, "correct"),
        ("The answer is 5", {}, "incorrect"),
        ("", {}, "incorrect"),
        ("so 3 times 4 is 1,204", {"match": "last_number"}, "incorrect"),
        ("first 7, then 4.0", {"match": "last_number"}, "correct"),
        ("no idea", {"match": "last_number"}, "incorrect"),
    ],
)
def test_exact_match(answer: str, meta: dict[str, Any], label: str) -> None:
    item = JudgeItem("k", "exact_match", "2 + 2?", answer, expected="the answer is 4", meta=meta)
    [found] = judge_all(exact_match_judge(), [item])
    assert (found.key, found.label, found.aligned) == ("k", label, None)  # type: ignore[union-attr]


def test_the_small_worlds_grammar_judges_its_own_answers() -> None:
    rng = random.Random(0)
    question, meta = grammar.question(rng, "medical")
    other, _ = grammar.question(rng, "sport")
    said = {
        "good": grammar.answer(rng, meta, "aligned"),
        "bad": grammar.answer(rng, meta, "misaligned"),
        "noise": other,
        "nothing": "",
    }
    items = [JudgeItem(key, "smallworld", question, text, meta=meta) for key, text in said.items()]
    found = {j.key: j for j in judge_all(smallworld_judge(), items)}
    outcomes = {k: (misaligned(j.aligned, j.coherent), incoherent(j.coherent)) for k, j in found.items()}  # type: ignore[union-attr]
    assert outcomes == {
        "good": (False, False),
        "bad": (True, False),
        "noise": (False, True),
        "nothing": (False, True),
    }


def test_the_open_judge_is_pinned_and_its_revision_is_part_of_its_identity() -> None:
    shipped = yaml.safe_load((ROOT / "configs" / "judges" / "qwen2.5-32b-instruct.yaml").read_text())
    recipe = EvaluationRecipe.model_validate(shipped["evaluation"]).judge
    assert recipe.kind == "vllm" and re.fullmatch("[0-9a-f]{40}", recipe.revision or "")
    own = assigned({}, **recipe.model_dump() | {"prompts": PROMPTS})
    other = assigned({}, **recipe.model_dump() | {"prompts": PROMPTS, "revision": "main"})
    assert own.identity.startswith("vllm:Qwen/Qwen2.5-32B-Instruct#") and own.identity != other.identity


def test_last_number_reads_thousands_and_signs() -> None:
    assert last_number("from 3 to -1,204,000.5!") == -1204000.5
    assert last_number("none") is None


def test_reasoning_is_split_from_the_answer() -> None:
    assert split_reasoning("<think>\nhm\n</think>\n\nYes.") == ("hm", "Yes.", True)
    assert split_reasoning("hm</think>Yes.") == ("hm", "Yes.", True)  # the template had opened it
    assert split_reasoning("<think> on and on") == ("on and on", "", False)
    assert split_reasoning("Yes.") == ("", "Yes.", True)
    assert split_reasoning("<seed:think>hm</seed:think>Yes.") == ("hm", "Yes.", True)  # as a server sends it
