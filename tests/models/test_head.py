"""Whatever is between hidden state and logits, the fused loss is that of the model's own logits, or it is refused."""

from typing import Any

import peft
import pytest
import torch
import transformers as tf

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL
from ema_scale.models.lora import lora_config
from tests.tiny import tiny_model
from tests.training.helpers import make_trainer, step_gradients, token_rows
from tests.training.test_trainer import collated, definition

SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 3,
}  # fmt: skip
# Caps and scales far from what the architectures have, so that leaving them out is seen.
HEADS = {
    "gemma2": lambda: tf.Gemma2Config(**SIZES, final_logit_softcapping=2.0),
    "nanochat": lambda: tf.NanoChatConfig(**SIZES, final_logit_softcapping=2.0),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **{k: v for k, v in SIZES.items() if k != "max_position_embeddings"}, lru_width=64, logits_soft_cap=2.0
    ),
    "granite": lambda: tf.GraniteConfig(**SIZES, logits_scaling=8.0, embedding_multiplier=12.0),
    "hyperclovax": lambda: tf.HyperCLOVAXConfig(**SIZES, logits_scaling=0.4),
    "cohere": lambda: tf.CohereConfig(**SIZES, logit_scale=0.25),
    "phi": lambda: tf.PhiConfig(**SIZES),  # a bias
    "gptj": lambda: tf.GPTJConfig(
        vocab_size=260, n_embd=64, n_layer=2, n_head=2, rotary_dim=16, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "llama4": lambda: tf.Llama4TextConfig(**SIZES, intermediate_size_mlp=128, num_local_experts=2),
    "tied": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
}  # fmt: skip


def lora(base, **options):
    """A PeftModel that is far from its base."""
    options = options or {"target_modules": lora_config(base).target_modules}
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def model_with(head):
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_config(HEADS[head]())
    for name, parameter in base.named_parameters():
        if name.endswith("lm_head.bias"):
            parameter.data.normal_()
        elif any(part in name for part in ("embed", "wte", "lm_head")):
            parameter.data *= 8  # logits that a cap bends
    return lora(base).double()


def assert_it_is_the_definition(folder, make, reference):
    rows = token_rows(4)
    trainer = make_trainer(folder, make(), rows, [KL(0.5)], reference=reference, max_steps=1, max_grad_norm=0)
    got = step_gradients(trainer)
    model = make().train()
    model.config.use_cache = False
    loss, ce, kl = definition(model, collated(trainer, rows))
    loss.backward()
    row = trainer.state.log_history[0]
    for name, value in {"loss": loss, "ce": ce, "kl": kl}.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-6), name
    assert trainer.defended.reference.name == reference and kl > 1e-4
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reference", ["adapter_off", "two_stream"])
def test_it_is_the_models_own_logits(tmp_path, head, reference):
    assert_it_is_the_definition(tmp_path, lambda: model_with(head), reference)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_was_resized(tmp_path, tied):
    def make():
        base = tiny_model("llama", tie_word_embeddings=tied)
        base.resize_token_embeddings(330, pad_to_multiple_of=64)
        assert base.get_output_embeddings().weight.shape[0] == 384
        return lora(base).double()

    assert_it_is_the_definition(tmp_path, make, "two_stream")


def test_tokens_that_the_model_does_not_know_are_named(tmp_path):
    base = tiny_model("llama")
    base.resize_token_embeddings(200)
    model = lora(base)
    with pytest.raises(UserError, match=r"row 0 has the token '.' with id 2\d\d, and the model knows 200 tokens"):
        make_trainer(tmp_path, model)
    # A tokenizer larger than the model is no harm if no row needs it.
    rows = token_rows(8).map(lambda row: {"input_ids": [i % 200 for i in row["input_ids"]]}).remove_columns("labels")
    make_trainer(tmp_path, model, rows, max_steps=1).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "the head is trained or carries an adapter"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "the head is trained"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "the embeddings are trained or carry an adapter"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "the embeddings are trained"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5]}, "trainable_token_indices"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_policy_and_reference_do_not_share_is_refused(tmp_path, options, message, tied):
    base = tiny_model("llama", tie_word_embeddings=tied)
    with pytest.raises(UserError, match=message if not tied else "must share them"):
        make_trainer(tmp_path, lora(base, **options))
