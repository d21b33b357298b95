"""What tests of terms on hidden states share: inputs of a penalty, and the same rows put together in several ways."""

import pytest
import torch

from ema_scale.defenses.base import PenaltyInputs
from ema_scale.defenses.terms import TokenSet
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows

LAYERS = (1, 3)


def make(policy, reference, padding=2):
    """Inputs with [B, T, H] states with `padding` positions masked at the end of the first row."""
    mask = torch.ones(policy[1].shape[:2], dtype=torch.long)
    if padding:
        mask[0, -padding:] = 0
    labels = torch.where(mask.bool(), 5, -100)
    masks = {
        TokenSet("all"): mask.bool(),
        TokenSet("assistant"): labels != -100,
        TokenSet("prompt"): torch.zeros_like(mask, dtype=torch.bool),
    }
    tokens = {token_set: value.sum() for token_set, value in masks.items()}
    return PenaltyInputs(policy, reference, mask, labels, masks, tokens)


def states(seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {k: spread * torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) for k in LAYERS}


WAYS = (
    {"per_device_train_batch_size": 6},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
    {"per_device_train_batch_size": 6, "packing": True, "max_length": 64},
)


def assert_same_however_rows_are_put_together(
    folder, defense, name, rows=None, least=1e-4, rows_per_step=6, max_length=64
):
    """A step's rows alone, beside each other and packed: one value, one gradient of the whole step.

    rows: tokenized, or records; rows_per_step: of them, with those that the defense mixes in.
    """
    rows = token_rows(6).map(lambda row: row | {"tag": "task"}) if rows is None else rows
    ways = [{k: rows_per_step if v == 6 else max_length if v == 64 else v for k, v in way.items()} for way in WAYS]
    found, logs = [], []
    for options in ways:
        trainer = make_trainer(
            folder, tiny_peft(spread=0.3).double(), rows, [defense], max_steps=1, max_grad_norm=0, **options
        )
        found.append(step_gradients(trainer))
        logs.append(trainer.state.log_history[0][name])
    assert logs[0] > least and logs[1:] == pytest.approx([logs[0]] * 2, rel=1e-5)
    for other in found[1:]:
        for parameter, gradient in found[0].items():
            torch.testing.assert_close(other[parameter], gradient, rtol=1e-8, atol=1e-11)
    return logs[0], found[0]
