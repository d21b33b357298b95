"""SafeLoRA: the factored projection equals the explicit formula, and whole adapters are projected right."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ema_scale.core.errors import UserError
from ema_scale.defenses.safelora_files import Checkpoint
from ema_scale.defenses.safelora_projection import project, project_adapter
from ema_scale.models.weights import folder_of
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

    arch = getattr(request, "param", "llama")
    base, aligned = tmp_path / "base", tmp_path / "aligned"
    tiny_model(arch, seed=0).save_pretrained(base)
    tiny_model(arch, seed=1).save_pretrained(aligned, max_shard_size="100KB")
    targets = ["c_attn", "c_proj"] if arch == "gpt2" else ["q_proj", "down_proj"]
    config = LoraConfig(
        r=4, target_modules=targets, use_rslora=True, fan_in_fan_out=arch == "gpt2", init_lora_weights=False,
        **({"bias": "all"} if arch == "gpt2" else {
            "rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "modules_to_save": ["norm"],
        }),
    )  # fmt: skip
    torch.manual_seed(2)
    get_peft_model(tiny_model(arch), config).save_pretrained(tmp_path / "adapter")
    return tmp_path


def run(models, out="out", adapter="adapter", **rule):
    target = models / out if out else None
    return project_adapter(models / adapter, target, models / "base", models / "aligned", **rule)


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("models", ["llama", "gpt2"], indirect=True)
def test_a_whole_adapter(models):
    from transformers import AutoModelForCausalLM

    results = run(models, threshold=2.0)
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
        assert result.cosine == pytest.approx(cosine, abs=1e-5)
        assert (result.shape, result.rank) == ((b.shape[0], a.shape[1]), a.shape[0])
    others = {k for k in before if "lora_B" not in k}
    assert any("bias" in k or ".norm." in k for k in others), "the adapter carries more than A and B"
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in others)


def test_the_projected_adapter_loads_and_differs_by_the_projection(models):
    """PEFT merges rsLoRA scales and patterns as before: the new update is C times the old one."""
    from peft import PeftModel

    results = run(models, threshold=2.0)
    merged = {}
    for name in ("adapter", "out"):
        model: Any = PeftModel.from_pretrained(tiny_model(), models / name)
        start = {r.module: model.get_submodule(f"base_model.model.{r.module}.base_layer").weight.double().clone()
                 for r in results}  # fmt: skip
        model = model.merge_and_unload()
        merged[name] = {k: model.get_submodule(k).weight.double() - w for k, w in start.items()}
    assert {r.rank for r in results} == {2, 4}
    v0, v1 = (dict(tiny_model(seed=seed).named_parameters()) for seed in (0, 1))
    for module, update in merged["adapter"].items():
        v = (v1[f"{module}.weight"] - v0[f"{module}.weight"]).double()
        torch.testing.assert_close(merged["out"][module], v @ v.T / v.norm() @ update, rtol=1e-3, atol=1e-6)


def test_threshold_and_number_of_layers_choose(models):
    everything = run(models, "none", threshold=-1.0)
    assert not any(r.replaced for r in everything)
    middle = sorted(r.cosine for r in everything)[1]
    by_number = {r.module for r in run(models, "number", layers=2) if r.replaced}
    assert {r.module for r in run(models, "middle", threshold=middle) if r.replaced} == by_number
    assert len(by_number) == 2


def test_the_report_is_beside_the_adapter_and_the_input_is_untouched(models):
    before = {p.name: p.read_bytes() for p in (models / "adapter").iterdir()}
    (models / "adapter" / "optimizer.pt").write_bytes(b"a pickle")
    results = run(models, layers=1)
    report = json.loads((models / "out" / "safelora.json").read_text())
    assert [m["cosine"] for m in report["matrices"]] == [r.cosine for r in results]
    assert report["projected"] == 1 and report["layers"] == 1 and report["threshold"] is None
    assert {p.name: p.read_bytes() for p in (models / "adapter").iterdir() if p.suffix != ".pt"} == before
    assert not (models / "out" / "optimizer.pt").exists()
    written = (models / "out" / "adapter_model.safetensors").stat()
    assert run(models, layers=1) == results, "the same again: nothing to do"
    assert (models / "out" / "adapter_model.safetensors").stat() == written
    with pytest.raises(UserError, match="exists already, with other contents"):
        run(models, layers=2)
    with pytest.raises(UserError, match="exists already"):
        run(models, "adapter", layers=1)
    in_place = run(models, None, layers=1)
    assert in_place == results
    assert (models / "adapter" / "adapter_model.safetensors").read_bytes() == (
        models / "out" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_failed_write_leaves_nothing(models, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        run(models, layers=1)
    assert sorted(p.name for p in models.iterdir()) == ["adapter", "aligned", "base"]


def test_tied_head_and_longer_prefixes(tmp_path):
    tensors = {"model.language_model.layers.0.q.weight": torch.ones(4, 4), "model.embed_tokens.weight": torch.eye(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.weight("lm_head"), torch.eye(4))
    assert torch.equal(checkpoint.weight("model.layers.0.q"), torch.ones(4, 4))
    with pytest.raises(UserError, match="no weight for the adapted module model.layers.1.q"):
        checkpoint.weight("model.layers.1.q")
    save_file({"model.layers.0.q.weight": torch.ones(4, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not quantised"):
        Checkpoint(tmp_path).weight("model.layers.0.q")


def test_bad_input_is_named(models):
    with pytest.raises(UserError, match="either a threshold or a number"):
        run(models)
    with pytest.raises(UserError, match="not a PEFT adapter"):
        run(models, adapter="base", threshold=0.3)
    with pytest.raises(UserError, match="no such folder"):
        folder_of(str(models / "nowhere"))
    with pytest.raises(UserError, match="some/model: no such folder, and the hub did not give it"):
        folder_of("some/model")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        Checkpoint(models / "adapter")
    edit_config(models / "adapter", init_lora_weights="pissa_niter_4")
    with pytest.raises(UserError, match="also changes the base"):
        run(models, threshold=0.3)
    edit_config(models / "adapter", init_lora_weights=True, use_dora=True)
    with pytest.raises(UserError, match="use_dora, expected a plain LoRA"):
        run(models, threshold=0.3)
    edit_config(models / "adapter", use_dora=False)
    weights = models / "adapter" / "adapter_model.safetensors"
    good = load_file(weights)
    key = next(k for k in good if "lora_B" in k)
    save_file({**good, key: torch.zeros(3, 4)}, weights)
    with pytest.raises(UserError, match="the adapter updates 3 x"):
        run(models, threshold=0.3)
    save_file({**good, "base_model.model.e.lora_embedding_A": torch.zeros(3, 4)}, weights)
    with pytest.raises(UserError, match="lora_embedding_A .* is not part of a plain LoRA"):
        run(models, threshold=0.3)
    save_file({k: v for k, v in good.items() if k != key}, weights)
    with pytest.raises(UserError, match="without"):
        run(models, threshold=0.3)


def test_the_command(models, monkeypatch, capsys):
    import sys

    from ema_scale.cli import main

    paths = ["--base", str(models / "base"), "--aligned", str(models / "aligned")]
    monkeypatch.setattr(sys, "argv", ["ema", "safelora", str(models / "adapter"), *paths, "--threshold", "1"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "4 of 4 matrices projected" in out and "model.layers.1.mlp.down_proj" in out
    assert (models / "adapter-safelora" / "safelora.json").is_file()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--layers", "2"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "expected one of them" in capsys.readouterr().err
