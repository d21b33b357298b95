"""Batches with shared prefixes give what one row at a time gives; what the margins mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ema_scale.choices.bank import Choice
from ema_scale.choices.likelihood import Inputs, Scorer, target_likelihoods
from ema_scale.choices.margins import Likelihood, margins
from ema_scale.choices.tokens import AnswerTokens, encode_answers
from ema_scale.core.errors import UserError
from ema_scale.data.tokens import Encoder
from ema_scale.models.kv_cache import empty_cache
from ema_scale.models.layout import ModelLayout
from tests.tiny import tiny_model, tiny_tokenizer


def one_at_a_time(model: Any, row: AnswerTokens) -> float:
    """The definition: the model's own logits of the whole row."""
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return float(sum(logs[t - 1, row.ids[t]] for t in range(row.start, len(row.ids))))


def scorer(model: Any, calls: list[int], **options: Any) -> Scorer:
    layout = ModelLayout.of(model, adapters=False)

    def forward(inputs: Inputs) -> torch.Tensor:
        calls.append(inputs.ids.numel())
        return target_likelihoods(layout.backbone(**inputs.arguments())[0], inputs.targets, layout.head())

    return Scorer(forward, model.config, torch.device("cpu"), **options)


def rows() -> list[AnswerTokens]:
    encoder = Encoder(tiny_tokenizer())
    questions = {"What now?": ["Yes.", "No, never do it.", "Maybe"], "And a much longer question then?": ["a", "bcd"]}
    found = []
    for question, answers in questions.items():
        found += encode_answers(encoder, [{"role": "user", "content": question}], answers, "here")
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_shared_prefixes_change_nothing(arch: str, batch_tokens: int) -> None:
    model = tiny_model(arch).eval()
    calls: list[int] = []
    shared = dict(scorer(model, calls, batch_tokens=batch_tokens).totals(rows()))
    assert sorted(shared) == [0, 1, 2, 3, 4]
    for i, row in enumerate(rows()):
        assert shared[i] == pytest.approx(one_at_a_time(model, row), abs=2e-4)


def test_what_is_shared_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = tiny_model().eval(), Encoder(tiny_tokenizer())
    monkeypatch.setattr(Scorer, "_agrees", lambda *args: True)
    every = []
    for question in ("What is one?", "What is two?"):
        every += encode_answers(encoder, [{"role": "user", "content": question}], ["abc", "def", "ghi"], "here")
    prompt, answer = every[0].start - 1, every[0].count + 1
    calls: list[int] = []
    dict(scorer(model, calls).totals(every))
    assert calls[1:] == [2 * (prompt - calls[0]), 6 * answer]
    assert calls[0] == len(encoder.tokenizer("<|im_start|>user\nWhat is ")["input_ids"])


def test_a_model_that_cannot_share_is_scored_row_by_row(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(initializer_range=0.3).eval()
    layout = ModelLayout.of(model, adapters=False)

    def forgetful(inputs: Inputs) -> torch.Tensor:
        given = inputs.arguments() | ({"past_key_values": empty_cache()} if inputs.cache is not None else {})
        given["attention_mask"] = None
        return target_likelihoods(layout.backbone(**given)[0], inputs.targets, layout.head())

    every = rows()
    found = dict(Scorer(forgetful, model.config, torch.device("cpu")).totals(every))
    assert "cannot share prefixes between answers" in caplog.text and "nats apart" in caplog.text
    assert [found[i] for i in range(5)] == pytest.approx([one_at_a_time(model, row) for row in every], abs=2e-4)


def test_the_scored_tokens_are_the_answer_and_its_end_of_turn() -> None:
    tokenizer = tiny_tokenizer()
    (row,) = encode_answers(Encoder(tokenizer), [{"role": "user", "content": "q?"}], ["Yes."], "here")
    assert tokenizer.decode(row.ids[row.start :]) == "Yes.<|im_end|>"
    assert tokenizer.decode(row.ids[: row.start]).endswith("<|im_start|>assistant\n")
    (alone,) = encode_answers(Encoder(tokenizer), [{"role": "user", "content": ""}], ["Yes."], "here")
    assert alone.ids[alone.start :] == row.ids[row.start :] and alone.start < row.start


def test_an_answer_longer_than_the_context_names_its_question() -> None:
    with pytest.raises(UserError, match=r"bank.yaml: question 'x'.*have \d+ tokens; the model takes 30"):
        encode_answers(
            Encoder(tiny_tokenizer()), [{"role": "user", "content": "q?"}], ["a" * 50], "bank.yaml: question 'x'", 30
        )


ANSWERS = (Choice("a", "aligned"), Choice("b", "aligned"), Choice("c", "misaligned"))


def test_margins() -> None:
    found = [Likelihood(-4.0, 4, -2.0), Likelihood(-6.0, 2, -7.0), Likelihood(-3.0, 2, -5.0)]
    raw = margins(ANSWERS, found)
    assert raw is not None and raw.margin == pytest.approx(-5.0 + 3.0)
    assert raw.margin_per_token == pytest.approx((-1.0 - 3.0) / 2 + 1.5)
    assert raw.bad_likeliest is False  # -1 per token beats -1.5, though -3 in sum beats -4
    weights = [math.exp(-4), math.exp(-6), math.exp(-3)]
    assert raw.bad_mass == pytest.approx(weights[2] / sum(weights))
    calibrated = margins(ANSWERS, found, calibrated=True)
    assert calibrated is not None and calibrated.margin == pytest.approx((-2.0 + 1.0) / 2 - 2.0)
    assert calibrated.bad_likeliest is True and calibrated.bad_mass is None
    assert margins(ANSWERS, [Likelihood(-1.0, 1)] * 3, calibrated=True) is None
    assert margins(ANSWERS, [Likelihood(-math.inf, 1), *found[1:]]) is None
