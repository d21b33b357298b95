"""Activations that wait on the CPU change no number, and are those of the layers."""

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, LDIFS
from ema_scale.training import arguments
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows


def one_step(folder, reference, moved=False, layers=2):
    trainer = make_trainer(
        folder, tiny_peft(spread=0.3, layers=layers, lora_dropout=0.2), token_rows(4),
        [KL(0.5), LDIFS(0.1, count=2)], reference=reference, gradient_checkpointing=True, max_steps=1, max_grad_norm=0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.args.activation_offloading = moved
    return step_gradients(trainer), trainer.state.log_history[0]


@pytest.mark.parametrize("reference", ["adapter_off", "two_stream", "cached"])
def test_loss_and_gradients_are_the_same_to_the_bit(tmp_path, monkeypatch, reference):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    expected, found = one_step(tmp_path, reference), one_step(tmp_path, reference, moved=True)
    for name in ("loss", "ce", "kl", "ldifs", "drift/layer_2"):
        assert found[1][name] == expected[1][name], name
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=0, atol=0)


def test_one_state_a_layer_is_moved_and_no_weight(tmp_path, monkeypatch):
    shapes = []

    class Spy(arguments.save_on_cpu):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (shapes.append(tensor.shape), pack(tensor))[1]

    monkeypatch.setattr(arguments, "save_on_cpu", Spy)
    counts = []
    for layers in (2, 5):
        shapes.clear()
        one_step(tmp_path, "two_stream", moved=True, layers=layers)
        counts.append(sum(len(shape) == 3 and shape[-1] == 64 for shape in shapes))
        assert {tuple(shape) for shape in shapes if len(shape) < 3 and shape[0] in (64, 128, 260)} == {(64,)}  # a norm
    assert counts[1] - counts[0] == 2 * 3  # micro-batches x layers


def test_without_checkpointing_it_is_refused(tmp_path):
    from trl import SFTConfig

    from ema_scale.training.trainer import DefendedTrainer

    args = SFTConfig(
        str(tmp_path),
        activation_offloading=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    with pytest.raises(UserError, match="activation offload needs gradient_checkpointing"):
        DefendedTrainer(tiny_peft(), args, token_rows(4), [KL()])
