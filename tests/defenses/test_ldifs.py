"""LDIFS: the definition in float64, a right gradient, nothing at zero drift, and padding that never counts."""

from typing import Any

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.defenses import LDIFS
from tests.defenses.penalties import LAYERS, assert_same_however_rows_are_put_together, make, states


def by_hand(policy, reference, normalise, mask):
    total = 0.0
    for layer in LAYERS:
        values = []
        if normalise == "sequence":
            for p, r, real in zip(policy[layer], reference[layer], mask.bool(), strict=True):
                p, r = p[real].flatten(), r[real].flatten()
                values += [((p / p.norm() - r / r.norm()) ** 2).sum()] * int(real.sum())
            total = total + sum(values) / len(values)
            continue
        for row, column in mask.nonzero().tolist():
            p, r = policy[layer][row, column], reference[layer][row, column]
            if normalise == "unit":
                p, r = p / p.norm(), r / r.norm()
            d = ((p - r) ** 2).sum()
            values.append(d / (r**2).sum() if normalise == "relative" else d)
        total = total + sum(values) / len(values)
    return total


FORMS = ["unit", "sequence", "relative", "none"]


@pytest.mark.parametrize("normalise", FORMS)
def test_value_and_gradient_are_the_definitions(normalise):
    policy, reference = states(0), states(1)
    leaf = policy[1].requires_grad_()
    inputs = make(policy, reference)
    defense = LDIFS(0.7, normalise=normalise)
    value = defense.penalty(inputs)
    torch.testing.assert_close(value, 0.7 * by_hand(policy, reference, normalise, inputs.attention_mask))
    value.backward()
    assert leaf.grad.abs().sum() > 0 and (leaf.grad[0, -2:] == 0).all()

    def loss(x):
        return defense.penalty(make({1: x, 3: policy[3]}, reference))

    assert torch.autograd.gradcheck(loss, (leaf.detach().clone().requires_grad_(),))


def test_no_drift_costs_nothing():
    same = states(0)
    assert LDIFS(3.0).penalty(make(same, {k: v.clone() for k, v in same.items()})) == 0


@pytest.mark.parametrize("normalise", FORMS)
@pytest.mark.parametrize("rubbish", [float("inf"), float("nan"), 1e30])
def test_padding_never_counts_in_value_or_gradient_even_if_it_holds_rubbish(normalise, rubbish):
    found = []
    for spoil in (False, True):
        policy, reference = states(0), states(1)
        if spoil:
            for state in (*policy.values(), *reference.values()):
                state[0, -2:] = rubbish
        leaf = policy[1].requires_grad_()
        value = LDIFS(normalise=normalise).penalty(make(policy, reference))
        value.backward()
        found.append((value.detach(), leaf.grad))
    assert found[0][1].abs().sum() > 0 and (found[1][1][0, -2:] == 0).all()
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("normalise", FORMS)
def test_half_precision_states_lose_no_more_than_their_own_rounding(normalise):
    policy, reference = states(0, 3.0), states(1, 3.0)
    half = [{k: v.bfloat16() for k, v in side.items()} for side in (policy, reference)]
    rounded = [{k: v.double() for k, v in side.items()} for side in half]
    results = []
    for one, other in (half, rounded):
        leaf = one[1].requires_grad_()
        value = LDIFS(normalise=normalise).penalty(make(one, other))
        value.backward()
        results.append((value.detach().double(), leaf.grad.double()))
    assert results[0][1].abs().sum() > 0
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-5)
    same = {k: v.detach() for k, v in half[0].items()}
    assert LDIFS(normalise=normalise).penalty(make(same, same)) == 0


@pytest.mark.parametrize("normalise", FORMS)
def test_the_value_does_not_depend_on_how_rows_are_put_together(normalise, tmp_path):
    """Alone, beside each other, and packed into one sequence."""
    assert_same_however_rows_are_put_together(tmp_path, LDIFS(0.7, normalise=normalise, at_layers=[1, 2]), "ldifs")


def test_the_released_form_is_the_flattened_one():
    """Each layer's features of a row, flattened and of length 1, squared l2, summed over layers; without a gradient."""
    policy, reference = ({k: v[1:].detach() for k, v in states(seed).items()} for seed in (0, 1))
    flat = [{k: v.flatten() / v.flatten().norm() for k, v in side.items()} for side in (policy, reference)]
    expected = sum((flat[0][k] - flat[1][k]).square().sum() for k in LAYERS)
    policy[1].requires_grad_()
    value = LDIFS(1.0, normalise="sequence", detached=True).penalty(make(policy, reference, padding=0))
    torch.testing.assert_close(value, expected)
    assert not value.requires_grad


def test_detached_has_the_value_and_no_gradient():
    policy, reference = states(0), states(1)
    policy[1].requires_grad_()
    value = LDIFS(detached=True).penalty(make(policy, reference))
    torch.testing.assert_close(value, LDIFS().penalty(make(policy, reference)))
    assert not value.requires_grad


def test_layers_are_spread_and_end_with_the_last():
    assert LDIFS().penalty_layers(28) == (6, 11, 17, 22, 28)
    assert LDIFS().penalty_layers(2) == (1, 2) and LDIFS(count=1).penalty_layers(12) == (12,)
    assert LDIFS(at_layers=[3, 1, 3]).penalty_layers(28) == (1, 3)


def test_the_released_codes_layers_can_be_chosen():
    released = LDIFS(at_layers="released")
    assert released.penalty_layers(28) == (1, 7, 14, 21, 28) and released.penalty_layers(64) == (1, 16, 32, 48, 64)
    for layers in range(1, 100):
        for count in (1, 2, 3, 5):
            picked = {int(i) + 1 for i in torch.linspace(0, layers - 1, min(count, layers), dtype=torch.float64)}
            assert LDIFS(at_layers="released", count=count).penalty_layers(layers) == tuple(sorted(picked))
    with pytest.raises(UserError, match="strength"):
        LDIFS(-1)
    wrong: Any
    for wrong in ([], [-1], "all"):
        with pytest.raises(UserError, match="at_layers"):
            LDIFS(at_layers=wrong)


def test_layers_that_there_are_not_end_a_run_before_it_starts(tmp_path):
    from tests.training.helpers import make_trainer

    with pytest.raises(UserError, match="ldifs: at_layers: found 3, expected 0 to 2"):
        make_trainer(tmp_path, defenses=[LDIFS(at_layers=[1, 3])]).train()


def test_it_holds_hidden_states_back_in_training(tmp_path):
    from tests.training.helpers import make_trainer

    drifts = {}
    for strength in (0.0, 100.0):
        trainer = make_trainer(tmp_path, defenses=[LDIFS(strength)], max_steps=8, drift_every=1)
        trainer.train()
        drifts[strength] = trainer.state.log_history[-2]["drift/layer_2"]
        assert trainer.state.log_history[0]["ldifs"] == pytest.approx(0, abs=1e-9)
    assert drifts[100.0] < 0.7 * drifts[0.0]
