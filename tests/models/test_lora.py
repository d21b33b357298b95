"""Base model and adapter: which layers, which start, whole files."""

import json
import os

import pytest
import torch

from ema_scale.config.sections import AdapterRecipe, ModelRecipe
from ema_scale.core.checkpoints import is_complete
from ema_scale.core.errors import UserError
from ema_scale.defenses.registry import adapter_files
from ema_scale.models.load import pick_dtype
from ema_scale.models.lora import build_model, lora_config, save_adapter
from tests.tiny import save_tiny, tiny_model
from tests.training.helpers import ARCHITECTURES, adapter_weights, make_trainer, tiny_peft

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_adapter_sits_on_every_projection_of_every_layer(arch):
    config = lora_config(tiny_model(arch))
    expected = {"c_attn", "c_proj", "c_fc"} if arch == "gpt2" else SEVEN
    assert set(config.target_modules) == expected
    assert config.fan_in_fan_out == (arch == "gpt2")
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (32, 64, True, 0.0)


def test_build_model(tmp_path):
    path = save_tiny(tmp_path / "m", "gpt2")
    recipe = AdapterRecipe(r=4, alpha=8, dropout=0.2)
    one, same, other = (build_model(ModelRecipe(path=path), recipe, seed=s) for s in (3, 3, 4))
    base = one.get_base_model()
    assert next(base.parameters()).dtype == torch.float32
    dropouts = {n: m.p for n, m in base.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for n, p in dropouts.items() if "lora" in n} == {0.2}
    assert {p for n, p in dropouts.items() if "lora" not in n} == {0.0}  # GPT-2's own are 0.1
    mine, twin, third = map(adapter_weights, (one, same, other))
    assert all(torch.equal(mine[n], twin[n]) for n in mine)
    assert any(not torch.equal(mine[n], third[n]) for n in mine)


def test_save_adapter_takes_the_place_of_an_older_one_and_loads(tmp_path):
    from peft import PeftModel

    path = save_tiny(tmp_path / "m")
    model = build_model(ModelRecipe(path=path), AdapterRecipe(r=4, alpha=8.5, rslora=False))
    for parameter in adapter_weights(model).values():
        assert parameter.dtype == torch.float32
    folder = tmp_path / "adapter"
    save_adapter(build_model(ModelRecipe(path=path), AdapterRecipe(r=2, target_modules=["q_proj"])), folder)
    (folder / "safelora.json").write_text("{}")  # what an older run's projection said of its own weights
    save_adapter(model, folder, stale=adapter_files())
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == path and config["lora_alpha"] == 8.5
    loaded = PeftModel.from_pretrained(model.unload(), folder)
    assert sum("lora_" in n for n, _ in loaded.named_parameters()) == 2 * 2 * 7


def test_saving_into_the_output_folder_loses_neither_checkpoints_nor_a_user_s_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(".", max_steps=1, save_strategy="steps", save_steps=1)
    for name in ("notes.txt", "README.md", "data/rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    trainer.train()
    trainer.save_model()
    assert is_complete(tmp_path / "checkpoint-1") and (tmp_path / "adapter_config.json").is_file()
    assert all((tmp_path / name).read_text() == "mine" for name in ("notes.txt", "README.md", "data/rows.jsonl"))
    assert not list(tmp_path.glob(".adapter*"))


def test_a_kill_between_two_files_leaves_no_config_beside_weights_of_another_adapter(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    save_adapter(tiny_peft(), folder)
    replace = os.replace
    for allowed in (0, 1):
        left = iter([replace] * allowed)
        monkeypatch.setattr(os, "replace", lambda *paths, left=left: next(left)(*paths))
        with pytest.raises(StopIteration):
            save_adapter(tiny_peft(r=8), folder)
        assert not (folder / "adapter_config.json").exists()
    monkeypatch.setattr(os, "replace", replace)
    save_adapter(tiny_peft(r=8), folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8


def test_weights_that_were_not_gathered_are_refused(tmp_path):
    model = tiny_peft()
    next(p for n, p in model.named_parameters() if "lora_B" in n).data = torch.empty(0)
    with pytest.raises(UserError, match="no elements"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_errors_name_the_field(tmp_path):
    with pytest.raises(UserError, match=r"model\.path: found '.*nowhere'"):
        build_model(ModelRecipe(path=str(tmp_path / "nowhere")), AdapterRecipe())
    pickled = tmp_path / "pickled"
    save_tiny(pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.path: .*safetensors"):
        build_model(ModelRecipe(path=str(pickled)), AdapterRecipe())
    with pytest.raises(UserError, match=r"model\.dtype: found 'float8'"):
        pick_dtype("float8")
    assert pick_dtype("bfloat16") == torch.bfloat16


def test_a_fresh_adapter_depends_on_the_seed_alone(tmp_path):
    """Also where the trainer makes it: transformers seeds too late for that."""
    found = []
    for seed, before in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(before)
        trainer = make_trainer(tmp_path, tiny_model(), seed=seed)
        found.append(next(p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_A" in n))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
