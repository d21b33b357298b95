"""Latent blocking: the definition in float64, one-sided, the same however rows are put together."""

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.defenses import LatentBlocking
from ema_scale.models.directions import Directions
from tests.defenses.penalties import LAYERS, assert_same_however_rows_are_put_together, make, states
from tests.training.helpers import make_trainer


def saved(path, layers, width, seed, recommended=1):
    vectors = torch.randn(layers + 1, width, generator=torch.Generator().manual_seed(seed))
    Directions(vectors, {"recommended_layer": recommended}).save(path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    return [saved(tmp_path / f"{seed}.safetensors", 4, 6, seed) for seed in (5, 6, 7)]


def by_hand(policy, reference, mask, up, down, normalise):
    total = 0.0
    for layer in LAYERS:
        values = []
        for row, column in mask.nonzero().tolist():
            r = reference[layer][row, column]
            moved = (policy[layer][row, column] - r) / (r.norm() if normalise == "relative" else 1)
            units = [(1, d) for d in up] + [(-1, d) for d in down]
            along = [sign * moved @ (d.vectors[layer].double() / d.vectors[layer].double().norm()) for sign, d in units]
            values.append(sum(max(x, 0 * x) ** 2 for x in along))
        total = total + sum(values) / len(values)
    return total


@pytest.mark.parametrize("normalise", ["relative", "none"])
def test_value_and_gradient_are_the_definitions(files, normalise):
    policy, reference = states(0), states(1)
    leaf = policy[1].requires_grad_()
    defense = LatentBlocking(0.7, files[:2], files[2], list(LAYERS), "all", normalise)
    inputs = make(policy, reference)
    value = defense.penalty(inputs)
    up, down = [Directions.load(f) for f in files[:2]], [Directions.load(files[2])]
    expected = by_hand(policy, reference, inputs.attention_mask, up, down, normalise)
    torch.testing.assert_close(value, 0.7 * expected, rtol=1e-6, atol=0)
    value.backward()
    assert leaf.grad.abs().sum() > 0 and (leaf.grad[0, -2:] == 0).all()

    def loss(x):
        return defense.penalty(make({1: x, 3: policy[3]}, reference))

    assert torch.autograd.gradcheck(loss, (leaf.detach().clone().requires_grad_(),))


def test_the_other_way_is_free(files):
    """Down along a direction that may not grow, up along one that may not shrink, and not at all."""
    u, w = (Directions.load(file).unit(1).double() for file in files[:2])
    reference = {1: torch.randn(2, 5, 6, dtype=torch.float64)}
    for moved, defense in (
        (-2 * u, LatentBlocking(vector=files[0], at_layers=[1], scope="all")),
        (0 * u, LatentBlocking(vector=files[0], at_layers=[1], scope="all")),
        (2 * w - 2 * u + 4 * (u @ w) * u, LatentBlocking(vector=files[0], floor=files[1], at_layers=[1], scope="all")),
    ):
        assert moved @ u <= 1e-9 and moved @ w >= -1e-9 or "floor" not in defense.model_fields_set
        leaf = (reference[1] + moved).requires_grad_()
        value = defense.penalty(make({1: leaf}, reference))
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-9) and leaf.grad.abs().max() < 1e-9
    leaf = (reference[1] + 2 * u).requires_grad_()
    defense = LatentBlocking(1.0, files[0], at_layers=[1], scope="all", normalise="none")
    assert defense.penalty(make({1: leaf}, reference)).item() == pytest.approx(4.0)


def test_the_value_does_not_depend_on_how_rows_are_put_together(tmp_path):
    file = saved(tmp_path / "v.safetensors", 2, 64, 0)
    defense = LatentBlocking(0.7, file, at_layers="all")
    assert_same_however_rows_are_put_together(tmp_path, defense, "latent_blocking", least=1e-6)


@pytest.mark.parametrize("way", ["two_stream", "cached"])
def test_it_holds_a_direction_back_in_training(tmp_path, monkeypatch, way):
    """The last step's excess, under a strength that does nothing and under a large one."""
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    file = saved(tmp_path / "v.safetensors", 2, 64, 0, recommended=2)
    read = {}
    for strength in (1e-3, 1e4):
        trainer = make_trainer(tmp_path / "run", defenses=[LatentBlocking(strength, file)], max_steps=8, reference=way)
        trainer.train()
        first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
        assert first["latent_blocking"] == pytest.approx(0, abs=1e-9) and last["ce"] < first["ce"]
        read[strength] = last["latent_blocking"] / strength
    assert trainer.reference_choice.way == way
    assert read[1e4] < 0.2 * read[1e-3]


def test_what_does_not_fit_is_refused(tmp_path, files):
    with pytest.raises(UserError, match="made for 4 layers of hidden size 6, the model has 2 of 64"):
        make_trainer(tmp_path, defenses=[LatentBlocking(vector=files[0])]).train()
    with pytest.raises(UserError, match="latent_blocking: none.safetensors: no such file"):
        make_trainer(tmp_path, defenses=[LatentBlocking(vector="none.safetensors")])
    two = saved(tmp_path / "two.safetensors", 2, 64, 0)
    with pytest.raises(UserError, match="found layer 3, expected 0 to 2"):
        make_trainer(tmp_path, defenses=[LatentBlocking(vector=two, at_layers=[3])]).train()
    assert LatentBlocking(vector="none.safetensors").penalty_layers(8) == (4,)
    assert LatentBlocking(vector=two, at_layers=[2, 1, 2]).penalty_layers(8) == (1, 2)
    assert LatentBlocking(vector=two).penalty_layers(8) == (1,)
