"""Judge prompts of any name and number: asked, kept, and shown as means or rates with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe
from ema_scale.core.io import append_jsonl, read_jsonl
from ema_scale.evaluation.judging.rejudge import rejudge
from ema_scale.evaluation.records import Manifest, Sample, Summary
from ema_scale.evaluation.stats.arms import read_arm
from ema_scale.evaluation.stats.paired import compare
from ema_scale.evaluation.stats.rates import clustered_mean
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.evaluation.table import rates_table
from tests.evaluation.endpoint import Endpoint, Reply, completion

CONTEXT = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."})


def stored(folder: Path, prompts: dict[str, str], context: tuple[dict[str, str], ...] = ()) -> Path:
    """Two answers to each of three questions, not judged yet."""
    questions = tuple(Question(str(i), (f"q{i}?",), 2, judge_prompts=prompts, context=context) for i in range(3))
    settings = EvaluationRecipe(judge=JudgeRecipe(model="m"))
    suites = (Suite("s", "general", questions),)
    folder.mkdir(parents=True)
    Manifest(target="t", model="x", adapter=None, settings=settings, suites=suites).write(folder / "asked.json")
    extra: dict[str, Any] = {"context": list(context)} if context else {}
    rows = [
        Sample(
            key=f"s/{q.id}/0/{i}#d",
            suite="s",
            question_id=q.id,
            sample=i,
            question=f"q{q.id}?",
            answer=f"a{i}",
            **extra,
        )
        for q in questions
        for i in range(2)
    ]
    append_jsonl(folder / "samples.jsonl", (row.to_row() for row in rows))
    return folder


def says(scores: dict[str, int]) -> Any:
    def respond(body: dict[str, Any], number: int) -> Reply:
        name = body["messages"][0]["content"].partition(":")[0]
        return completion(str(scores[name]), [(str(scores[name]), -0.0001)])

    return respond


def judged(folder: Path, **scores: int) -> tuple[Summary, list[dict[str, Any]]]:
    with Endpoint(says(scores)) as endpoint:
        return rejudge(folder, [f"evaluation.judge.base_url={endpoint.url}"]), endpoint.requests


def prompts(*names: str) -> dict[str, str]:
    return {name: f"{name}: {{question}} {{answer}}" for name in names}


def test_prompts_beside_the_two_are_asked_and_scored(tmp_path: Path) -> None:
    folder = stored(tmp_path / "eval", prompts("aligned", "coherent", "medical"))
    found, requests = judged(folder, aligned=10, coherent=90, medical=70)
    assert len(requests) == 3 * 6
    assert found.metrics["general_misaligned"].rate == 1.0 and found.notes == []
    mean = found.per_suite["s"].scores["medical"]
    assert (round(mean.mean, 6), mean.n, mean.questions, mean.dropped) == (70, 6, 3, 0)
    assert mean.low <= 70 <= mean.high and "medical in s" in rates_table({"t": found})
    assert read_jsonl(folder / "judgements.jsonl")[0]["scores"] == {"medical": 70}


def test_one_prompt_of_another_name_makes_no_rates(tmp_path: Path) -> None:
    found, requests = judged(stored(tmp_path / "eval", prompts("correct")), correct=80)
    assert len(requests) == 6 and found.dropped == {}
    assert found.metrics["general_misaligned"] is None and found.metrics["general_incoherent"] is None
    assert round(found.per_suite["s"].scores["correct"].mean, 6) == 80 and found.general_variants is None


def test_aligned_alone_counts_without_coherence_and_says_so(tmp_path: Path) -> None:
    one, other = (
        stored(tmp_path / "one" / "eval", prompts("aligned")),
        stored(tmp_path / "two" / "eval", prompts("aligned")),
    )
    found, _ = judged(one, aligned=10)
    assert found.metrics["general_misaligned"].rate == 1.0 and found.metrics["general_incoherent"] is None
    assert found.notes == ["6 answers have no coherence score: they are misaligned where aligned is below 30"]
    judged(other, aligned=90)
    measures = {m.measure: m for m in compare(read_arm(tmp_path / "one"), read_arm(tmp_path / "two"))}
    assert measures["general misaligned"].difference.value == 1.0


def test_the_judge_sees_the_turns_before_the_question(tmp_path: Path) -> None:
    _, requests = judged(stored(tmp_path / "eval", prompts("aligned"), CONTEXT), aligned=90)
    text = requests[0]["messages"][0]["content"]
    assert "User: Hi.\n\nAssistant: Hello.\n\nUser: q" in text


def test_the_interval_of_a_mean_takes_questions_as_units() -> None:
    alike = clustered_mean([("a", 10.0), ("a", 20.0), ("b", 80.0), ("b", 90.0), ("c", None)])
    assert alike.mean == pytest.approx(50) and (alike.n, alike.questions, alike.dropped) == (4, 2, 1)
    spread = clustered_mean([(str(i), v) for i, v in enumerate([10.0, 20.0, 80.0, 90.0] * 5)])
    assert alike.low < spread.low < 50 < spread.high < alike.high
    rating = clustered_mean([("a", 3.0), ("b", 4.0)], 1, 5)
    assert rating.mean == pytest.approx(3.5) and 1 <= rating.low < 3.5 < rating.high <= 5
