"""Gradients of a defense's terms apart from the rest: projected as SafeGrad's formula says, however a step is split."""

import math
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, LDIFS, SafeGrad, parse
from ema_scale.defenses.gradients import cosine
from ema_scale.training.trainer import DefendedTrainer
from tests.defenses.one_step import Plain, assert_no_split_changes_it, assert_same_gradients, one_step, rows_with

TAGS = ("task", "prompts", "task", "task", "prompts", "task", "safe", "task")
SEEDS = range(4)


@pytest.fixture(autouse=True)
def rows_are_there_already(monkeypatch):
    """As if the defenses had mixed them in."""
    for kind in (SafeGrad, KL):
        monkeypatch.setattr(kind, "changes_rows", False)


def gradients_of(plain, *losses):
    """Those of each loss, with the names of the trained weights."""
    trained = {n: p for n, p in plain.model.named_parameters() if p.requires_grad}
    return trained, [torch.autograd.grad(loss, list(trained.values()), retain_graph=True) for loss in losses]


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def losses_of(plain, strength=0.7):
    """The task's loss with a KL of another defense, and the alignment loss."""
    rows = plain.of("task", "safe") & plain.spoken
    rest = -plain.log_label[rows].mean() + 0.2 * plain.kl()[plain.of("task", "safe") & plain.real].mean()
    back = (plain.log_q.exp() * (plain.log_q - plain.log_p)).sum(-1)
    return rest, strength * back[plain.of("prompts") & plain.real].mean()


def test_what_opposes_the_alignment_gradient_is_taken_out_and_nothing_else(tmp_path):
    signs = set()
    for seed in SEEDS:
        found, log, trainer = one_step(tmp_path, rows_with(TAGS, seed), [KL(0.2), SafeGrad(0.7, "unused")])
        plain = Plain(trainer)
        rest, own = losses_of(plain)
        trained, (g_task, g_align) = gradients_of(plain, rest, own)
        task, align = flat(g_task), flat(g_align)
        product = task @ align
        signs.add(bool(product < 0))
        expected = task + align - min(product, torch.zeros(())) / (align @ align) * align
        got = torch.cat([found[name].flatten() for name in trained])
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)
        assert (got - align) @ align >= -1e-9 * (align @ align), "what is left does not oppose it"
        assert math.isclose(log["safegrad_cosine"], product / task.norm() / align.norm(), rel_tol=1e-4)
        assert math.isclose(log["loss"], (rest + own).item(), rel_tol=2e-5)
        assert math.isclose(log["grad_norm"], expected.norm(), rel_tol=1e-4), "and clipping sees the joined one"
    assert signs == {True, False}, "both cases were met"


def test_no_split_changes_the_joined_gradient(tmp_path):
    names = ["loss", "ce", "kl", "safegrad", "safegrad_cosine", "ldifs"]
    defenses = [KL(0.2), SafeGrad(0.7, "unused"), LDIFS(0.1, count=2)]
    assert_no_split_changes_it(tmp_path, rows_with(TAGS, 1), defenses, names)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"reference": "two_stream"}])
def test_checkpointing_and_the_way_of_the_reference_change_nothing(tmp_path, options):
    defenses = [SafeGrad(0.7, "unused")]
    plain = one_step(tmp_path, rows_with(TAGS, 1), defenses)[0]
    assert_same_gradients(one_step(tmp_path, rows_with(TAGS, 1), defenses, **options)[0], plain)


def test_a_step_without_its_rows_takes_the_rest_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("ema_scale.defenses.row_groups.RowGroups.check", lambda self, tags: None)
    with_it, log, _ = one_step(tmp_path, rows_with(["task"] * 4), [SafeGrad(0.7, "unused")])
    assert_same_gradients(with_it, one_step(tmp_path, rows_with(["task"] * 4), [])[0])
    assert log["safegrad_cosine"] == 0


def test_evaluation_takes_the_sum_of_all_losses(tmp_path):
    rows = rows_with(TAGS)
    _, _, trainer = one_step(tmp_path, rows, [SafeGrad(0.7, "unused")], learning_rate=0.0, eval_dataset=rows)
    read = trainer.evaluate()
    assert math.isclose(read["eval_loss"], trainer.state.log_history[0]["loss"], rel_tol=1e-5)


PLUG_IN = """
    from ema_scale.defenses import KL, Defense

    class Sign(KL):
        '''Keeps of the rest what has the sign of its own gradient.'''
        kind = "sign"

        def join_gradients(self, rest, own):
            return [r * (r * o > 0) + o for r, o in zip(rest, own, strict=True)]

    class Close(Defense):
        '''A penalty on hidden states whose gradient is dropped.'''
        kind = "close"

        def penalty_layers(self, num_layers):
            return (num_layers,)

        def penalty(self, inputs):
            (layer,) = inputs.policy
            policy, reference = inputs.states(layer)
            return inputs.mean((policy - reference).square().sum(-1))

        def join_gradients(self, rest, own):
            return rest
"""


def test_a_file_of_ones_own_joins_gradients_and_several_follow_one_another(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(PLUG_IN))
    sign, close = parse([{"kind": f"{file}:Sign", "strength": 0.5}, f"{file}:Close"])
    rows = rows_with(["task"] * 4)
    found, log, trainer = one_step(tmp_path, rows, [sign, close])
    assert log["close"] > 0 and log["close_cosine"] != 0
    plain = Plain(trainer)
    trained, (task, own) = gradients_of(
        plain, -plain.log_label[plain.spoken].mean(), 0.5 * plain.kl()[plain.real].mean()
    )
    for name, r, o in zip(trained, task, own, strict=True):
        torch.testing.assert_close(found[name], r * (r * o > 0) + o, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("sharding", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharding_that_shows_no_whole_gradient_is_refused(sharding):
    flags = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, sharding: True}
    trainer: Any = SimpleNamespace(defenses=[SafeGrad(0.7, "unused")], **flags)
    with pytest.raises(UserError, match="safegrad: acts on the gradient.*; train without them"):
        DefendedTrainer._check_gradient_access(trainer)


def test_the_cosine_of_nothing_is_zero():
    some, none = [torch.ones(3)], [torch.zeros(3)]
    assert cosine(some, none) == cosine(none, none) == 0 and cosine(some, some) == 1
