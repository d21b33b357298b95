"""Shapes: the table against published numbers of parameters, the formulas against real models."""

import json

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.models.flops import flops
from ema_scale.planning.model_shapes import PUBLISHED, from_config, shape_of
from ema_scale.smallworld.build import _new_model
from ema_scale.smallworld.sizes import SIZES
from ema_scale.smallworld.tokenizer import vocabulary
from tests.tiny import tiny_config, tiny_model
from tests.training.helpers import tiny_peft

# As the hub's pages of the safetensors say.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
}  # fmt: skip


def test_the_table_has_the_published_numbers_of_parameters():
    assert {name: from_config(name, values).parameters for name, values in PUBLISHED.items()} == PARAMETERS


def test_a_hub_id_is_found_in_the_table_whoever_copied_it(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert shape_of("unsloth/Qwen2.5-7B-Instruct").parameters == PARAMETERS["qwen2.5-7b"]
    assert shape_of("meta-llama/Llama-3.3-70B-Instruct").parameters == PARAMETERS["llama-3.1-70b"]


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_real_model(arch, tied):
    config = tiny_config(arch, tie_word_embeddings=tied)
    shape = from_config(arch, json.loads(config.to_json_string(use_diff=False)))
    with torch.device("meta"):
        model = tiny_model(arch, tie_word_embeddings=tied)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_lora_is_what_peft_makes():
    model = tiny_peft("llama", r=4)
    shape = from_config("tiny", model.get_base_model().config.to_dict())
    assert shape.lora(4) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.lora(4, ["q_proj"]) < shape.lora(4, ["q_proj", "v_proj"]) < shape.lora(4)


def test_operations_are_those_of_the_real_model():
    from ema_scale.planning.arithmetic import _flops
    from ema_scale.planning.setup import FLOAT32, Setup

    model = tiny_peft("qwen2", r=4)
    shape = from_config("tiny", model.get_base_model().config.to_dict())
    setup = Setup(shape, 1, 24, 24, 1, False, 4, None, FLOAT32)
    assert _flops(shape, setup) == flops(model, 24)


@pytest.mark.parametrize("size", list(SIZES))
def test_a_small_world_has_the_shape_of_its_checkpoints(size, monkeypatch, tmp_path):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path))
    words = vocabulary()
    model = _new_model(SIZES[size], len(words), words)
    shape = shape_of(f"smallworld:aligned?size={size}")
    assert shape == from_config(shape.name, model.config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert not list(tmp_path.iterdir())


def test_a_folder_says_its_own_shape(tmp_path):
    config = tiny_config("llama", hidden=96, layers=3)
    config.save_pretrained(tmp_path)
    assert (shape_of(str(tmp_path)).hidden, shape_of(str(tmp_path)).layers) == (96, 3)


def test_what_is_not_known_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"'somebody/unheard-of'.*qwen2.5-7b"):
        shape_of("somebody/unheard-of")
    (tmp_path / "config.json").write_text(tiny_config("gpt2").to_json_string())
    with pytest.raises(UserError, match="model_type: found 'gpt2'.*llama, mistral"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 2}')
    with pytest.raises(UserError, match="num_hidden_layers: missing"):
        shape_of(str(tmp_path))
    with pytest.raises(UserError, match="target_modules: found 'qkv'"):
        from_config("x", PUBLISHED["qwen2.5-7b"]).lora(4, ["qkv"])
