"""What makes another reference, and so another cache, and what does not."""

import peft
import torch

from ema_scale.models.layout import ModelLayout
from ema_scale.reference.fingerprint import fingerprint
from tests.training.helpers import tiny_peft


def test_all_runs_over_one_base_share_it_and_no_other_does():
    model = tiny_peft()
    name = fingerprint(ModelLayout.of(model), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    assert fingerprint(ModelLayout.of(model), model) == name
    assert fingerprint(ModelLayout.of(wide := tiny_peft(r=8)), wide) == name
    assert fingerprint(ModelLayout.of(model), model, "bf16") != name
    assert fingerprint(ModelLayout.of(half := tiny_peft().bfloat16()), half) != name
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data[3, 5] += 1e-3
    assert fingerprint(ModelLayout.of(model), model) != name


def test_another_implementation_of_attention_makes_another_reference():
    """Gemma 2 caps its attention's scores, which sdpa cannot: the states differ by far more than rounding."""

    def made(way):
        model = tiny_peft("gemma2", attn_implementation=way, attn_logit_softcapping=1.0)
        for layer in model.get_base_model().model.layers:
            layer.self_attn.q_proj.base_layer.weight.data *= 100
        with torch.no_grad():
            return fingerprint(ModelLayout.of(model), model), model(input_ids=torch.arange(4, 40)[None]).logits

    (eager, capped), (sdpa, plain) = made("eager"), made("sdpa")
    assert eager == made("eager")[0] != sdpa
    assert (capped - plain).abs().max() > 1e-3


def test_what_a_checkpoint_holds_besides_weights_makes_another_reference():
    def router(bias):
        model = tiny_peft()
        layer = model.get_base_model().model.layers[0]
        layer.register_buffer("correction_bias", torch.tensor([0.0, bias]))
        layer.register_buffer("computed", torch.tensor([bias]), persistent=False)
        return fingerprint(ModelLayout.of(model), model)

    assert router(0.0) == router(0.0) != router(0.5)


def test_a_frozen_adapter_is_known_by_the_scale_of_each_of_its_modules():
    def continued(**more):
        model = tiny_peft()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **more)
        model.add_adapter("reference", config)
        for name, parameter in model.named_parameters():
            if ".reference." in name:
                parameter.data = torch.ones_like(parameter)
                parameter.requires_grad_(False)
        return fingerprint(ModelLayout.of(model), model)

    assert continued() == continued() != continued(alpha_pattern={"up_proj": 32})
