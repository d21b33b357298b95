"""Padded on either side, loss, divergences, penalties and gradients are those of rows without padding."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from ema_scale.data.collate import ChatCollator
from ema_scale.defenses import KL, LDIFS
from ema_scale.training.token_masks import count_tokens, pad_right, token_masks
from tests.models.test_head import lora, model_with
from tests.tiny import tiny_tokenizer
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows

DEFENSES = [KL(0.5), KL(0.4, "reference_policy", scope="prompt"), LDIFS(0.3, count=2)]
# BLOOM's attention takes its softmax in float32, whose sum over a longer row may be grouped in another way.
ROUNDING = {"bloom": 1e-9}
FILLS = {"input_ids": 3, "attention_mask": 0, "labels": -100, "template": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))


def model_of(arch):
    if arch == "bloom":  # positions are made of the mask
        torch.manual_seed(0)
        return lora(tf.BloomForCausalLM(tf.BloomConfig(vocab_size=260, hidden_size=64, n_layer=2, n_head=2))).double()
    return model_with(arch) if arch == "recurrent_gemma" else tiny_peft(arch, spread=0.3).double()


def one_step(folder, arch, reference, side=None, **options):
    """Gradients and first log of a step over rows apart, or over one batch of them, padded far more than needed."""
    batch = (1, 4) if side is None else (4, 1)
    trainer = make_trainer(
        folder, model_of(arch), token_rows(4), DEFENSES, reference=reference, max_steps=1, max_grad_norm=0,
        per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1], **options,
    )  # fmt: skip
    if side is not None:
        collate = ChatCollator(tiny_tokenizer(), padding_side=side)
        more = (5, 0) if side == "left" else (0, 5)
        trainer.data_collator = lambda rows: {
            k: F.pad(v, more, value=FILLS[k]) if k in FILLS else v for k, v in collate(rows).items()
        }
    return step_gradients(trainer), trainer.state.log_history[0]


# Rotary positions, learned ones, a sliding window, positions made of the mask, recurrent layers.
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "bloom", "recurrent_gemma"])
def test_either_side_equals_no_padding(tmp_path, arch):
    gradients, log = one_step(tmp_path, arch, "adapter_off")
    for side, reference in (
        ("right", "two_stream"),
        ("left", "adapter_off"),
        ("left", "two_stream"),
        ("left", "cached"),
    ):
        found, row = one_step(tmp_path, arch, reference, side)
        for name in ("loss", "ce", "kl", "kl_2", "ldifs", "accuracy", "entropy", "drift/layer_2"):
            assert row[name] == pytest.approx(log[name], rel=1e-6), (side, reference, name)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=ROUNDING.get(arch, 1e-12))


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_moved_together_and_counted_alike(packing):
    from ema_scale.data.packing import pack

    rows = pack(token_rows(9), 40) if packing else token_rows(9)
    left, right = (ChatCollator(tiny_tokenizer(), padding_side=side)(list(rows)) for side in ("left", "right"))
    moved = pad_right(left)
    assert (left["attention_mask"][:, 0] == 0).any()
    assert moved.keys() == right.keys() and all(torch.equal(moved[k], right[k]) for k in right)
    assert all(torch.equal(pad_right(right)[k], right[k]) for k in right)
    assert torch.equal(count_tokens(token_masks(left)), count_tokens(token_masks(right)))
