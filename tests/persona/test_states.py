"""Mean response states against transformers' own hidden states, row by row, and projections onto directions."""

import math

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.data.rows import load_rows
from ema_scale.data.tokens import encode
from ema_scale.models.directions import Directions
from ema_scale.persona.states import project_rows, response_means
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.helpers import tiny_peft

ROWS = load_rows([
    {"prompt": "why?", "completion": "because of a long reason, " * n} for n in (3, 1, 6)
] + [
    {"messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]}
])  # fmt: skip


def one_by_one(model, rows):
    """float32 [rows, layers, H] from `output_hidden_states`; its last entry is after the final norm, so it is left
    out."""
    found = []
    for row in rows:
        encoded = encode(tiny_tokenizer(), row.messages)
        with torch.no_grad():
            states = model(input_ids=torch.tensor([encoded.input_ids]), output_hidden_states=True).hidden_states
        mask = torch.tensor(encoded.assistant_mask, dtype=torch.bool)
        found.append(torch.stack([state[0, mask].mean(0) for state in states[:-1]]))
    return torch.stack(found)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_means_are_those_of_the_answers_tokens(arch):
    model = tiny_model(arch, layers=3)
    model.train()
    expected = one_by_one(tiny_model(arch, layers=3).eval(), ROWS)
    for batch_tokens in (1, 300, 100_000):
        found = response_means(model, tiny_tokenizer(), ROWS, [0, 1, 2], batch_tokens=batch_tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.training
    assert found.dtype == torch.float32 and not found.requires_grad


def test_adapters_act_as_they_are_set():
    model = tiny_peft(spread=0.3)
    with_adapter = response_means(model, tiny_tokenizer(), ROWS, [0, 2])
    with model.disable_adapter():
        without = response_means(model, tiny_tokenizer(), ROWS, [0, 2])
    torch.testing.assert_close(with_adapter[:, 0], without[:, 0])
    assert (with_adapter[:, 1] - without[:, 1]).abs().max() > 1e-2
    torch.testing.assert_close(without, response_means(model.unload(), tiny_tokenizer(), ROWS, [0, 2]))


def test_projections_are_along_the_unit_direction():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    directions = Directions(7.0 * torch.randn(3, 64), {"recommended_layer": 2}, "v")
    means = response_means(model, tokenizer, ROWS, [1, 2])
    for layer, column in ((1, 0), (2, 1), (None, 1)):
        found = project_rows(model, tokenizer, ROWS, directions, layer)
        expected = means[:, column] @ directions.vectors[layer or 2] / directions.vectors[layer or 2].norm()
        torch.testing.assert_close(torch.tensor(found), expected)
    cut = project_rows(model, tokenizer, ROWS, directions, 1, max_length=40)
    assert [math.isnan(value) for value in cut] == [False, False, False, True]


def test_what_does_not_fit_is_refused():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(UserError, match="the model has 2 of 64"):
        project_rows(model, tokenizer, ROWS, Directions(torch.randn(3, 32)), 1)
    with pytest.raises(UserError, match="layers: found 3, expected 0 to 2"):
        response_means(model, tokenizer, ROWS, [3])
