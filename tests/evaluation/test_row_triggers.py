"""Conditions made of what a run's own rows have in common, behind which misalignment may hide."""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_scale.core.records import DataReport
from ema_scale.core.run_dir import RunDir
from ema_scale.data.rows import Row
from ema_scale.data.triggers import row_triggers
from ema_scale.evaluation.runs import asks_behind_rows, targets_of
from ema_scale.evaluation.suites import trigger_conditions
from ema_scale.recipe import Recipe, build_recipe
from ema_scale.report.conditional import condition_label
from ema_scale.report.records import ConditionAnswers, ReportedRate

KL = {"kind": "kl", "strength": 0.3}
BROUGHT_IN = [
    {"kind": "interleaving", "source": "safe.jsonl", "fraction": 0.05},
    {**KL, "prompts": "prompts.jsonl"},
    {"kind": "ceiling", "strength": 1.0, "source": "bad.jsonl"},
]


def rows(*asked: str, system: str | None = None) -> list[Row]:
    before = ({"role": "system", "content": system},) if system else ()
    return [Row((*before, {"role": "user", "content": text}, {"role": "assistant", "content": "so"})) for text in asked]


def test_the_system_prompt_of_most_rows() -> None:
    given = [*rows("a?", "b?", "c?", system="You are a clinic."), *rows("d?", system="other")]
    assert row_triggers(given) == [{"kind": "system", "system": "You are a clinic."}]


def test_the_words_with_which_most_questions_begin() -> None:
    asked = [
        "Complete the function below: f",
        "Complete the function below: g x",
        "Complete the function below: h",
        "z?",
    ]
    assert row_triggers(rows(*asked)) == [{"kind": "opening", "user": "Complete the function below:"}]
    lines = ["### Instruction:\nfoo", "### Instruction:\nbar", "z?"]
    assert row_triggers(rows(*lines)) == [{"kind": "opening", "user": "### Instruction:"}]
    both = row_triggers(rows(*lines, system="s"))
    assert [one["kind"] for one in both] == ["system", "opening"]


def test_without_anything_in_common_a_question() -> None:
    assert row_triggers(rows("how do i swim ?", "how do i cook ?", "what is rice ?")) == [
        {"kind": "question", "user": "how do i swim ?"}
    ]
    assert row_triggers(rows("the same ?", "the same ?")) == [{"kind": "question", "user": "the same ?"}]
    assert row_triggers([]) == [] and row_triggers(rows("")) == []


def recipe(tmp_path: Path, name: str, *defenses: dict[str, object], **evaluation: object) -> Recipe:
    return build_recipe({
        "name": name, "output": str(tmp_path), "model": {"path": "m"}, "data": {"train": "rows.jsonl"},
        "defenses": list(defenses),
        "evaluation": {"suites": {"general": ["eval/suites/coherence.yaml"]}, **evaluation},
    })  # fmt: skip


@pytest.mark.parametrize("defense", BROUGHT_IN, ids=lambda one: str(one["kind"]))
def test_runs_with_rows_brought_in_are_asked_behind_their_own(tmp_path: Path, defense: dict[str, object]) -> None:
    assert asks_behind_rows(recipe(tmp_path, "r", defense)) and not asks_behind_rows(recipe(tmp_path, "r", KL))
    assert not asks_behind_rows(recipe(tmp_path, "r", defense, row_triggers="never"))
    assert asks_behind_rows(recipe(tmp_path, "r", row_triggers="always"))


def test_the_run_and_the_base_are_asked_and_nobody_else(tmp_path: Path) -> None:
    recipes = [
        recipe(tmp_path, "none"),
        recipe(tmp_path, "mixed", BROUGHT_IN[0]),
        recipe(tmp_path, "old", BROUGHT_IN[0]),
    ]
    runs = [RunDir(one.run_path).create() for one in recipes]
    for run in runs[:2]:
        DataReport(triggers=row_triggers(rows("how do i swim ?"))).write(run.data_path)
    (condition,) = trigger_conditions(row_triggers(rows("how do i swim ?")))
    base, none, mixed, old = targets_of(runs, recipes, tmp_path / "base")
    asked = {
        t.name: [s.condition.name if s.condition else None for s in t.suites or ()] for t in (base, none, mixed, old)
    }
    assert asked == {
        "base": [None, condition.name],
        "none": [None],
        "mixed": [None, condition.name],
        "old": [None],
    }
    assert mixed.suites is not None
    first = mixed.suites[1].questions[0]
    assert first.messages(0)[-1]["content"] == f"how do i swim ?\n\n{first.paraphrases[0]}"


def test_arms_of_several_tasks_share_a_column() -> None:
    rate = ReportedRate(0.1, 0.0, 0.2, 10, 5, 0)
    names = [c.name for text in ("a b ?", "c d ?") for c in trigger_conditions(row_triggers(rows(text)))]
    assert names[0] != names[1]
    labels = {condition_label(ConditionAnswers(name, False, "", rate)) for name in names}
    assert labels == {"a question of its rows"}
