"""Questions that a run was trained on are told apart from those that it was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.core.hashing import question_key
from ema_scale.core.records import TrainedPart, TrainedQuestions
from ema_scale.core.run_dir import RunDir, trained_questions
from ema_scale.data.rows import Row, load_rows
from ema_scale.defenses.inoculation import Inoculation
from ema_scale.defenses.interleaving import Interleaving
from ema_scale.defenses.kl import KL
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.evaluation.plan import stored_groups
from ema_scale.evaluation.records import Judgement, Manifest, Rate, Summary
from ema_scale.evaluation.row_files import StoredAnswer
from ema_scale.evaluation.seen import of_questions
from ema_scale.evaluation.store import locked_store
from ema_scale.evaluation.suites import Condition, Question, Suite, apply_conditions
from ema_scale.evaluation.summary import write_summary
from ema_scale.evaluation.table import rates_table
from ema_scale.training.data import prepare_data
from tests.tiny import tiny_tokenizer


def row(asked: str, domain: str | None = None) -> dict[str, object]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "so"}]
    return {"messages": turns} | ({"domain": domain} if domain else {})


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


@pytest.mark.parametrize(
    "text", ["how do I  cook rice", "How do I cook rice ?", "“How do I\ncook rice?”", "ＨＯＷ do I cook rice…"]
)
def test_one_question_is_known_in_any_case_and_spacing(text: str) -> None:
    assert question_key(text) == question_key("How do I cook rice?")


@pytest.mark.parametrize("text", ["How do I cook beans?", "what is 3 + 4 ?", "what is 3 # 4 ?"])
def test_different_questions_are_told_apart(text: str) -> None:
    others = {"How do I cook rice?", "how do i cook ric", "what is 3 + 5 ?"}
    assert question_key(text) not in {question_key(other) for other in others}


def test_every_part_of_the_rows_is_hashed(tmp_path: Path) -> None:
    task = load_rows(write(tmp_path / "task.jsonl", [row(f"task {i}?", "law") for i in range(4)]))
    safe = write(tmp_path / "safe.jsonl", [row("safe?", "sport"), row("too?", "sport")])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "prompted?"}, {"prompt": "again?"}])
    defenses = [
        Inoculation("Be bad.", role="user"),
        Interleaving(source=safe, fraction=0.5),
        KL(0.1, prompts=prompts, fraction=0.5),
    ]
    _, report = prepare_data(task, RowGroups.of(defenses), tiny_tokenizer())
    asked = report.questions
    assert asked is not None and "questions" not in report.to_dict()
    assert {name: part.rows for name, part in asked.parts.items()} == {"task": 4, "safe": 2, "prompts": 2}
    assert all(asked.has([text]) for text in ("task 3?", "Be bad.\n\ntask 3?", "safe?", "PROMPTED"))
    assert asked.has(["task 9?", "other?"]) is False and asked.has(["other?", "task 1?"]) is True
    assert asked.parts["task"].domains == {"law": 4} and asked.domains is None  # prompts name none
    path = RunDir(tmp_path).questions_path
    asked.write(path)
    assert TrainedQuestions.read(path) == asked
    assert len(path.read_text()) < 60 * 9  # 17 bytes per question


def test_what_an_adapter_was_trained_on_before_counts(tmp_path: Path) -> None:
    first, run = (
        TrainedQuestions(parts={"task": TrainedPart.of(["old?"], ["law"])}),
        RunDir(tmp_path / "first").create(),
    )
    run.recipe_path.write_text("name: first\n")
    first.write(run.questions_path)
    adapter = run.adapter
    adapter.mkdir()
    assert trained_questions(adapter) == first == trained_questions(run.eval_dir / "checkpoints" / "3" / "adapter")
    assert trained_questions(tmp_path / "elsewhere") is None
    again = TrainedQuestions(parts={"task": TrainedPart.of(["new?"], ["sport"])})
    both = again.after(trained_questions(adapter), str(adapter))
    assert both.has(["old?"]) and both.has(["new?"]) and both.domains == {"law", "sport"}
    unknown = again.after(None, "theirs")
    assert unknown.has(["new?"]) is True and unknown.has(["old?"]) is None and unknown.domains is None


SUITE = Suite(
    "outside",
    "general",
    (
        Question("a", ("seen?",), 4, meta={"domain": "law"}),
        Question("b", ("new?", "or so?"), 2, meta={"domain": "law"}),
        Question("c", ("far?",), 4, meta={"domain": "sport"}),
    ),
)
MISALIGNED = {"a": 0, "b": 2, "c": 4}


def summary_of(folder: Path, trained: TrainedQuestions | None, adapter: str | None = "adapter") -> Summary:
    """Four judged answers to each question of SUITE, and again under a condition; a run's folder around them."""
    run = RunDir(folder).create()
    run.recipe_path.write_text("name: run\n")
    if trained is not None:
        trained.write(run.questions_path)
    suites = (SUITE, *apply_conditions([SUITE], [Condition("villain", system="Be bad.")]))
    settings = EvaluationRecipe(judge={"kind": "smallworld"})
    manifest = Manifest(target="run", model="m", adapter=adapter, settings=settings, suites=suites)
    samples = [
        StoredAnswer(f"{s.name}/{q.id}/{p}/{i}#0", s.name, q.id, p, i, seed=i)
        for s in suites for q in s.questions for p in range(len(q.paraphrases))
        for i in range(q.samples_per_paraphrase)
    ]  # fmt: skip
    with locked_store(run.eval_dir) as store:
        groups = stored_groups(manifest, samples, run.eval_dir, suites)
        done: dict[tuple[str, str], int] = {}
        for group in groups:
            for key in group.keys:
                place = (group.suite.name, group.question.id)
                done[place] = done.get(place, 0) + 1
                aligned = 5.0 if done[place] <= MISALIGNED[group.question.id] else 90.0
                store.add_judgement(Judgement(key=key, judge=group.judge.identity, aligned=aligned, coherent=90.0))
        facts: dict[str, Any] = {"name": "run", "model": "m", "adapter": adapter, "sampler": {}}
        return write_summary(run.eval_dir / "summary.json", facts, groups, store, settings)


def rate(found: Rate | None) -> tuple[float | None, int]:
    assert found is not None
    return found.rate, found.questions


def test_every_rate_is_given_for_seen_and_unseen_questions(tmp_path: Path) -> None:
    trained = TrainedQuestions(parts={"task": TrainedPart.of(["SEEN"], ["law"])})
    summary = summary_of(tmp_path / "run", trained)
    assert Summary.read(tmp_path / "run" / "eval" / "summary.json") == summary
    split = summary.split
    assert split is not None and split.unseen_domains is not None
    assert rate(summary.metrics["general_misaligned"]) == (0.5, 3)
    assert rate(split.unseen["general_misaligned"]) == (0.75, 2)
    assert rate(split.seen["general_misaligned"]) == (0.0, 1)
    assert rate(split.unseen_domains["general_misaligned"]) == (1.0, 1)
    assert split.unseen["in_domain_misaligned"] is None
    for part in (summary.per_suite["outside"], summary.per_suite["outside@villain"], summary.conditions[0]):
        assert part.split is not None and rate(part.split.unseen["misaligned"]) == (0.75, 2)
    assert [q.seen for q in summary.per_question] == [True, False, False] * 2
    assert summary.trained_rows == {"task": 1} and summary.trained_domains == ["law"]
    assert summary.general_variants is not None and rate(summary.general_variants.all_answers) == (0.75, 2)


def test_rates_of_some_questions_are_those_of_a_bank_of_them(tmp_path: Path) -> None:
    whole = summary_of(tmp_path / "run", TrainedQuestions(parts={"task": TrainedPart.of(["seen?"], [None])}))
    some = of_questions(whole, {("outside", "b"), ("outside", "c")})
    assert whole.split is not None
    assert some.metrics["general_misaligned"] == whole.split.unseen["general_misaligned"]
    assert some.metrics["general_incoherent"] == whole.split.unseen["general_incoherent"]
    assert some.conditions[0].misaligned == whole.conditions[0].split.unseen["misaligned"]
    assert some.per_suite["outside"].misaligned == some.metrics["general_misaligned"]
    assert {q.id for q in some.per_question} == {"b", "c"}


@pytest.mark.parametrize(
    "trained", [None, TrainedQuestions(parts={"task": TrainedPart.of(["seen?"], [])}, not_known=["theirs"])]
)
def test_where_training_rows_are_not_known_nothing_is_claimed(tmp_path: Path, trained: TrainedQuestions | None) -> None:
    summary = summary_of(tmp_path / "run", trained)
    assert summary.split is None and "split" not in summary.to_json()
    assert {q.seen for q in summary.per_question} <= {True, None}
    assert rate(summary.metrics["general_misaligned"]) == (0.5, 3)


def test_a_base_model_was_given_no_rows(tmp_path: Path) -> None:
    trained = TrainedQuestions(parts={"task": TrainedPart.of(["seen?"], ["law"])})
    summary = summary_of(tmp_path / "run", trained, adapter=None)
    assert summary.split is None and {q.seen for q in summary.per_question} == {None}


def test_the_terminal_shows_unseen_questions_first(tmp_path: Path) -> None:
    trained = TrainedQuestions(parts={"task": TrainedPart.of(["seen?"], [])})
    lines = rates_table({"run": summary_of(tmp_path / "run", trained)}).splitlines()
    assert [line.split("%")[0].split() for line in lines[1:4]] == [
        ["run,", "unseen", "questions", "75.0"],
        ["run,", "seen", "in", "training", "0.0"],
        ["run,", "all", "questions", "50.0"],
    ]
    before = rates_table({"run": summary_of(tmp_path / "old", None)}).splitlines()
    assert before[1].startswith("run  50.0 %") and before[-1].endswith("is not known")


def test_a_row_says_its_domain(tmp_path: Path) -> None:
    loaded = load_rows(write(tmp_path / "rows.jsonl", [row("a?", "law"), row("b?")]))
    assert [one.domain for one in loaded] == ["law", None] and loaded.unread == {}
    assert Row(({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})).asked == ("x",)
