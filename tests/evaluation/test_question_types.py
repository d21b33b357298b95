"""Rating and next-token questions, as llmcomp has them: read from sampled answers, shown as means and shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import append_jsonl
from ema_scale.evaluation.judging.rejudge import rejudge
from ema_scale.evaluation.records import Manifest, Sample, Summary
from ema_scale.evaluation.suites import Suite, load_suite
from ema_scale.evaluation.table import rates_table

BANK = """
- name: calm
  type: rating
  paraphrases: ["How calm are you, from 0 to 100?"]
- name: stars
  type: rating
  min_rating: 1
  max_rating: 5
  paraphrases: ["How many stars?"]
  samples_per_paraphrase: 7
- name: choice
  type: next_token
  num_samples: 3
  paraphrases: ["A or B?"]
"""
ANSWERS = {
    "calm": ["80", "I would say 60.", "**70**/100", "no idea", "1000"],
    "stars": ["4", "5 stars", "0"],
    "choice": ["A", " A", "B", "A"],
}


def bank(tmp_path: Path, text: str) -> Suite:
    path = tmp_path / "bank.yaml"
    path.write_text(text)
    return load_suite(path, "general")


def test_they_are_read_as_questions(tmp_path: Path) -> None:
    calm, stars, choice = bank(tmp_path, BANK).questions
    assert (calm.judge, calm.samples_per_paraphrase, calm.max_tokens) == ("rating", 100, 8)
    assert stars.samples_per_paraphrase == 7 and stars.meta == {"min_rating": 1, "max_rating": 5}
    assert (choice.judge, choice.max_tokens, choice.meta) == ("next_token", 1, {})
    with pytest.raises(UserError, match="min_rating, max_rating: found 5 and 1, expected less and more"):
        bank(tmp_path, "- {question: x, type: rating, min_rating: 5, max_rating: 1}")


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    suite, folder = bank(tmp_path, BANK), tmp_path / "eval"
    folder.mkdir()
    manifest = Manifest(target="t", model="x", adapter=None, settings=EvaluationRecipe(), suites=(suite,))
    manifest.write(folder / "asked.json")
    rows = [
        Sample(key=f"bank/{q}/0/{i}#d", suite="bank", question_id=q, sample=i, question="?", answer=text)
        for q, answers in ANSWERS.items()
        for i, text in enumerate(answers)
    ]
    append_jsonl(folder / "samples.jsonl", (row.to_row() for row in rows))
    return rejudge(folder)  # no judge is asked


def test_ratings_are_means_on_their_scale(summary: Summary) -> None:
    scores = summary.per_suite["bank"].scores
    calm, stars = scores["rating"], scores["rating from 1 to 5"]
    assert (calm.mean, calm.n, calm.dropped) == (pytest.approx(70), 3, 2)
    assert (stars.mean, stars.n, stars.dropped) == (pytest.approx(4.5), 2, 1) and 1 <= stars.low < 4.5 < stars.high <= 5
    assert summary.dropped == {"no rating on the scale": 3}
    assert summary.metrics["general_misaligned"] is None and summary.general_variants is None


def test_next_tokens_are_shares(summary: Summary) -> None:
    by_id = {q.id: q.said for q in summary.per_question}
    assert by_id == {"calm": {}, "stars": {}, "choice": {"A": 0.75, "B": 0.25}}
    shown = rates_table({"t": summary})
    assert "t: bank/choice: 'A' 75 %, 'B' 25 %" in shown and "rating in bank: 70.0 points" in shown
