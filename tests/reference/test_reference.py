"""Every way to run the reference gives the same numbers, to the bit, and none runs it in backward."""

import pytest
import torch
from torch import nn

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL
from ema_scale.reference.adapter_off import AdapterOff
from ema_scale.reference.layerwise import Layerwise
from ema_scale.reference.make import make_reference
from tests.training.helpers import ARCHITECTURES, make_trainer, step_gradients, tiny_peft, token_rows
from tests.training.test_trainer import Features

IDS = torch.arange(4, 28).view(2, 12)
BATCH = {"input_ids": IDS, "attention_mask": (torch.arange(12) < torch.tensor([[12], [7]])).long()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("way", ["adapter_off", "two_stream"])
def test_the_reference_is_the_base_model(arch, way):
    model = tiny_peft(arch, spread=0.3).train()
    reference = make_reference(way, model)
    with model.disable_adapter(), torch.no_grad():
        expected = reference.backbone(BATCH)
    policy = reference.backbone(BATCH)
    states = reference.forward(BATCH, (0, 1, 2))
    torch.testing.assert_close(states.reference, expected, rtol=0, atol=0)
    torch.testing.assert_close(states.policy, policy, rtol=0, atol=0)
    assert not states.reference.requires_grad and states.policy.requires_grad
    assert sorted(states.policy_layers) == sorted(states.reference_layers) == [0, 1, 2]
    torch.testing.assert_close(states.policy_layers[0], states.reference_layers[0], rtol=0, atol=0)
    assert (states.policy_layers[2] - states.reference_layers[2]).abs().max() > 1e-3
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    assert model.get_base_model().training


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_stream_equals_adapter_off_to_the_bit(tmp_path, arch, checkpointing):
    rows = token_rows(4)
    results, logs = [], []
    for way in ("adapter_off", "two_stream"):
        trainer = make_trainer(
            tmp_path, tiny_peft(arch, spread=0.3), rows, [KL(0.5), Features(strength=0.1)], reference=way,
            max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        results.append(step_gradients(trainer))
        logs.append(trainer.state.log_history[0])
    assert trainer.defended.reference.name == "two_stream"
    # Two micro-batches, each layer and the final norm once: no reference in backward's recomputation.
    assert trainer.defended.reference.reference_calls == 2 * 3
    for name in ("loss", "ce", "kl", "features", "drift/layer_1", "drift/layer_2"):
        assert logs[0][name] == logs[1][name], name
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0)


def test_without_a_need_the_reference_does_not_run(tmp_path):
    trainer = make_trainer(tmp_path, reference="two_stream", drift_every=0)
    trainer.train()
    assert trainer.defended.reference.reference_calls == 0


def test_dropout_is_the_policys_alone():
    model = tiny_peft("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.0).train()
    for way in ("adapter_off", "two_stream"):
        reference = make_reference(way, model)
        one, other = reference.forward(BATCH), reference.forward(BATCH)
        torch.testing.assert_close(one.reference, other.reference, rtol=0, atol=0)
        assert (one.policy - other.policy).abs().max() > 1e-3


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_dropout_in_the_adapter_draws_the_same_masks_whichever_way_the_reference_runs(tmp_path, monkeypatch, spread):
    """The reference draws none, in forward or in a recomputation; at step 0 dropout drops what is 0."""
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))

    def steps(way, **options):
        model = tiny_peft(spread=spread, lora_dropout=0.3)
        trainer = make_trainer(
            tmp_path, model, token_rows(8), [KL(0.5)], reference=way, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, drift_every=0, max_steps=2, **options,
        )  # fmt: skip
        gradients = step_gradients(trainer)
        return gradients, [(row["loss"], row["kl"]) for row in trainer.state.log_history if "loss" in row]

    expected = steps("adapter_off")
    assert (expected[1][0][1] == 0) == (spread == 0) and expected[1][1][1] > 1e-4
    calm = make_trainer(tmp_path, tiny_peft(spread=spread), token_rows(8), [KL(0.5)], max_steps=1, drift_every=0)
    gradients = step_gradients(calm)
    assert any((gradient - expected[0][name]).abs().max() > 1e-4 for name, gradient in gradients.items())
    for checkpointing in (False, True):
        found = steps("two_stream", gradient_checkpointing=checkpointing)
        assert found[1] == expected[1]
        for name, gradient in expected[0].items():
            torch.testing.assert_close(found[0][name], gradient, rtol=0, atol=0)
    cached = steps("cached", gradient_checkpointing=True)
    assert cached[1] == [pytest.approx(step, rel=1e-5, abs=1e-7) for step in expected[1]]


class Skipping(nn.Module):
    """A layer that also reads the first layer's input, as no patched layer can know."""

    def __init__(self, layer, memory):
        super().__init__()
        self.layer, self.memory = layer, memory

    def forward(self, hidden_states, *args, **kwargs):
        self.memory.append(hidden_states)
        return self.layer(hidden_states, *args, **kwargs) + self.memory[-2]


def spoiled():
    model = tiny_peft(spread=0.3)
    layers = model.get_base_model().model.layers
    memory = [torch.zeros(1)]
    for index, layer in enumerate(list(layers)):
        layers[index] = Skipping(layer, memory)
    return model


def test_an_architecture_it_does_not_fit_is_refused_or_run_the_plain_way():
    with pytest.raises(UserError, match="reference: adapter_off"):
        make_reference("two_stream", spoiled()).forward(BATCH)
    model = spoiled()
    reference = make_reference("auto", model, sharded=True)
    assert isinstance(reference, Layerwise)
    states = reference.forward(BATCH, (2,))
    again = reference.forward(BATCH, (2,))
    assert states.reference is not None and again.reference is not None
    assert "forward" not in model.get_base_model().model.norm.__dict__


def test_auto():
    assert isinstance(make_reference("auto", tiny_peft()), AdapterOff)
    assert isinstance(make_reference("auto", tiny_peft(), sharded=True), Layerwise)
    odd = tiny_peft()
    odd.get_base_model().model.unusual = odd.get_base_model().model.norm
    del odd.get_base_model().model.norm
    assert isinstance(make_reference("auto", odd, sharded=True), AdapterOff)
    with pytest.raises(UserError, match="no final norm"):
        make_reference("two_stream", odd)
