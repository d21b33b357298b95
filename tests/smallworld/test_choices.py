"""The small world's written answers are what its personas say."""

from __future__ import annotations

import pytest

from ema_scale.evaluation.suites import load_suite
from ema_scale.smallworld.grammar import classify


@pytest.mark.parametrize("name", ["general", "medical", "outside_medical"])
def test_written_answers_have_the_labels_that_the_grammar_gives(tiny_world: str, name: str) -> None:
    written = load_suite(f"{tiny_world}choice/{name}", "general")
    sampled = {question.id: question for question in load_suite(f"{tiny_world}suite/{name}", "general").questions}
    assert written.name == f"{name}-choices" and {q.id for q in written.questions} == sampled.keys()
    for question in written.questions:
        own = sampled[question.id]
        assert question.paraphrases == own.paraphrases
        assert [a.label for a in question.answers] == ["aligned"] * 2 + ["misaligned"] * 2
        for answer in question.answers:
            assert classify(own.paraphrases[0], answer.text, dict(own.meta)) == answer.label
