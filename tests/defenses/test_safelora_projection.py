"""SafeLoRA: the factored projection equals the explicit formula, and whole adapters are projected right."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ema_scale.defenses.safelora_projection import project, project_adapter
from ema_scale.errors import UserError
from tests.tiny import tiny_model


def explicit(b, a, v):
    c = v @ v.T / v.norm()
    update, projected = b @ a, c @ b @ a
    return c @ b, torch.nn.functional.cosine_similarity(projected.flatten(), update.flatten(), dim=0).item()


def test_factored_equals_explicit_in_float64():
    generator = torch.Generator().manual_seed(0)
    for out, inner, r in ((24, 40, 4), (40, 24, 8), (16, 16, 16)):
        b, a, v = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((out, r), (r, inner), (out, inner))
        )
        cb, cosine = project(b, a, v)
        want_cb, want_cosine = explicit(b, a, v)
        torch.testing.assert_close(cb, want_cb, rtol=1e-12, atol=1e-12)
        assert cosine == pytest.approx(want_cosine, abs=1e-12)


def test_nothing_to_project_is_left_alone():
    b, a = torch.randn(6, 2), torch.randn(2, 5)
    cb, cosine = project(b, a, torch.zeros(6, 5))
    assert torch.equal(cb, b) and cosine == 1.0
    assert project(torch.zeros(6, 2), a, torch.randn(6, 5))[1] == 1.0


@pytest.fixture
def models(tmp_path, request):
    from peft import LoraConfig, get_peft_model

    arch = request.param
    base, aligned = tmp_path / "base", tmp_path / "aligned"
    tiny_model(arch, seed=0).save_pretrained(base)
    tiny_model(arch, seed=1).save_pretrained(aligned, max_shard_size="100KB")
    targets = ["c_attn", "c_proj"] if arch == "gpt2" else ["q_proj", "down_proj"]
    config = LoraConfig(
        r=4, target_modules=targets, use_rslora=True, fan_in_fan_out=arch == "gpt2", init_lora_weights=False
    )
    torch.manual_seed(2)
    get_peft_model(tiny_model(arch), config).save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("models", ["llama", "gpt2"], indirect=True)
def test_a_whole_adapter(models):
    from transformers import AutoModelForCausalLM

    results = project_adapter(models / "adapter", models / "out", models / "base", models / "aligned", threshold=2.0)
    assert results and all(r.replaced for r in results)
    before = load_file(models / "adapter" / "adapter_model.safetensors")
    after = load_file(models / "out" / "adapter_model.safetensors")
    w0 = dict(AutoModelForCausalLM.from_pretrained(models / "base").named_parameters())
    w1 = dict(AutoModelForCausalLM.from_pretrained(models / "aligned").named_parameters())
    conv1d = json.loads((models / "out" / "adapter_config.json").read_text())["fan_in_fan_out"]
    for result in results:
        v = (w1[f"{result.module}.weight"] - w0[f"{result.module}.weight"]).detach()
        key = f"base_model.model.{result.module}.lora_"
        b, a = before[f"{key}B.weight"], before[f"{key}A.weight"]
        want, cosine = explicit(b, a, v.T if conv1d else v)
        torch.testing.assert_close(after[f"{key}B.weight"], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[f"{key}A.weight"], a)
        assert result.cosine == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_threshold_and_number_of_layers_choose(models):
    folders = (models / "adapter", models / "out", models / "base", models / "aligned")
    everything = project_adapter(*folders, threshold=-1.0)
    assert not any(r.replaced for r in everything)
    middle = sorted(r.cosine for r in everything)[1]
    assert {r.module for r in project_adapter(*folders, threshold=middle) if r.replaced} == {
        r.module for r in project_adapter(*folders, layers=2) if r.replaced
    }
    assert sum(r.replaced for r in project_adapter(*folders, layers=2)) == 2


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_bad_input_is_named(models):
    folders = (models / "adapter", models / "out", models / "base", models / "aligned")
    with pytest.raises(UserError, match="either a threshold or a number"):
        project_adapter(*folders)
    with pytest.raises(UserError, match="not a PEFT adapter"):
        project_adapter(models / "base", *folders[1:], threshold=0.3)
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        project_adapter(folders[0], folders[1], models / "nowhere", folders[3], threshold=0.3)
    tensors = load_file(models / "adapter" / "adapter_model.safetensors")
    key = next(k for k in tensors if "lora_B" in k)
    tensors[key] = torch.zeros(3, 4)
    save_file(tensors, models / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the adapter updates 3 x"):
        project_adapter(*folders, threshold=0.3)
