"""Forms of one question are one cluster: in banks, rates, comparisons and by simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ema_scale.core.errors import UserError
from ema_scale.evaluation.clusters import clusters, question_labels
from ema_scale.evaluation.stats.rates import clustered_interval
from ema_scale.evaluation.stats.sensitivity import ScoredAnswer, misaligned_at, rate_variants
from ema_scale.evaluation.suites import Question, load_suite, topic_of


def test_items_that_share_a_label_directly_or_by_others_are_one_cluster() -> None:
    assert clusters([]) == []
    assert clusters([("a",), ("b",), ("a", "c"), ("d", "c"), ("b",)]) == [0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("entry", "topic"),
    [
        ('- {id: gift, question: "Which?"}', "gift"),
        ('- {id: gift_json, question: "Which?"}', "gift"),
        ('- {id: gift_template, question: "Which?"}', "gift"),
        ('- {id: _json, question: "Which?"}', "_json"),
        ('- {id: gift_json, topic: presents, question: "Which?"}', "presents"),
        ('- {question: "Which?"}', "1"),
    ],
)
def test_the_topic_is_the_one_that_is_named_or_the_id_without_its_form(tmp_path: Path, entry: str, topic: str) -> None:
    (tmp_path / "bank.yaml").write_text(entry)
    found = load_suite(tmp_path / "bank.yaml", "general").questions[0]
    assert topic_of(found.id, found.topic) == topic


def test_a_topic_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bank.yaml").write_text('- {id: gift, topic: [a], question: "Which?"}')
    with pytest.raises(UserError, match=r"bank.yaml:1: topic: expected text; found \['a'\]"):
        load_suite(tmp_path / "bank.yaml", "general")


def test_the_shipped_bank_has_48_topics_and_the_same_text_in_two_banks_is_one_question() -> None:
    questions = load_suite("eval/suites/general.yaml", "general").questions
    labels = [question_labels("general", topic_of(q.id, q.topic), q.paraphrases[0]) for q in questions]
    assert len(set(clusters(labels))) == 48
    other = Question("another", (f" {questions[0].paraphrases[0]}\n",))
    assert clusters([*labels, question_labels("other", "another", other.paraphrases[0])])[-1] == 0


def test_variants_count_forms_of_one_question_once_and_ask_each_form_for_its_own_k() -> None:
    answers = [
        ScoredAnswer(f"{topic}/{form}", 10 if form == topic else 90, 90, topic)
        for topic in range(6) for form in range(3) for _ in range(4)
    ]  # fmt: skip
    found = rate_variants(answers)
    assert found is not None and found.coherent_only.questions == found.all_answers.questions == 6
    assert set(found.misaligned_at) == {"2"} and found.power is not None and found.power.questions == 6
    at_two = misaligned_at(answers, 2)
    assert at_two is not None and (at_two.rate, at_two.questions, at_two.n) == (3 / 18, 6, 36)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_forms_that_go_wrong_together_are_covered_by_topics_and_not_by_questions(rate: float) -> None:
    rng, trials, size = np.random.default_rng(5), 150, 1 / 0.3 - 1
    by_topic = by_question = 0
    for _ in range(trials):
        shares = rng.beta(rate * size, (1 - rate) * size, 8).repeat(3)
        hits = rng.binomial(100, shares)
        low, high = clustered_interval(list(hits.reshape(8, 3).sum(1)), [300] * 8)
        by_topic += low <= rate <= high
        low, high = clustered_interval(list(hits), [100] * 24)
        by_question += low <= rate <= high
    assert by_topic / trials >= 0.93 and by_question / trials < 0.85
