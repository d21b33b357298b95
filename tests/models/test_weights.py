"""Weights that are not what they claim to be are refused by every load, with the file and the tensor named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ema_scale.config.sections import AdapterRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.defenses.safelora_files import Adapter, Checkpoint
from ema_scale.defenses.safelora_projection import project_adapter
from ema_scale.models.checkpoint_adapter import export_adapter
from ema_scale.models.directions import Directions
from ema_scale.models.load import load_base
from ema_scale.models.lora import build_model, with_adapters
from ema_scale.models.weights import (
    check_adapter,
    check_checkpoint,
    check_finite,
    check_names,
    read_tensors,
    skeleton_of,
)
from tests.evaluation.conftest import save_adapter
from tests.tiny import save_tiny

MATRIX = "model.layers.0.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    save_tiny(root / "model")
    save_tiny(root / "gpt2", "gpt2")
    save_adapter(str(root / "model"), root / "adapter", rank=2, seed=0)
    return root


def read(file):
    return {name: tensor.clone() for name, tensor in load_file(file).items()}  # not mapped: the file is overwritten


def tensors(change):
    def damage(file: Path) -> None:
        found = read(file)
        change(found)
        save_file(found, file, {"format": "pt"})

    return damage


def content(data):
    return lambda file: file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pickled(file: Path) -> None:
    torch.save(read(file), file.with_suffix(".bin"))
    file.unlink()


def fake(file: Path) -> None:
    torch.save(read(file), file)


FILES = {
    "cut": (cut, "not a safetensors file, or not a whole one"),
    "empty": (content(b""), "not a safetensors file, or not a whole one"),
    "LFS pointer": (content(LFS), "a Git LFS pointer.*git lfs pull"),
    "pickle beside": (pickled, "pickles may run code"),
    "pickle by that name": (fake, r"a pickle \(torch.save\)"),
    "gone": (Path.unlink, "no .*model.safetensors"),
}
MODELS = FILES | {
    "missing": (tensors(lambda t: t.pop(MATRIX)), f"{MATRIX} is missing"),
    "left over": (tensors(lambda t: t.update(extra=torch.zeros(2))), "extra is of no use in this model"),
    "misshapen": (tensors(lambda t: t.update({MATRIX: torch.zeros(3, 4)})), f"{MATRIX} has the shape 3 x 4, expected"),
    "NaN": (tensors(lambda t: t[MATRIX].fill_(float("nan"))), f"{MATRIX} holds numbers that are not finite"),
    "infinite": (tensors(lambda t: t[MATRIX][0].fill_(float("-inf"))), f"{MATRIX} holds numbers that are not finite"),
    "renamed": (tensors(lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in [*t]]), "and 18 more are missing"),
}
ADAPTERS = FILES | {
    "missing": (tensors(lambda t: t.pop(LORA)), f"{LORA} is missing"),
    "left over": (tensors(lambda t: t.update(extra=torch.zeros(2))), "extra is of no use in this model"),
    "misshapen": (tensors(lambda t: t.update({LORA: torch.zeros(3, 2)})), f"{LORA} has the shape 3 x 2, expected 64"),
    "NaN": (tensors(lambda t: t[LORA].fill_(float("nan"))), f"{LORA} holds numbers that are not finite"),
    "renamed": (tensors(lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in [*t]]), "more are missing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", MODELS)
@pytest.mark.parametrize("load", [load_base, check_checkpoint], ids=["transformers", "vllm"])
def test_a_model_s_weights(sound, tmp_path, load, damage):
    change, said = MODELS[damage]
    shutil.copytree(sound / "model", tmp_path / "m")
    change(tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        load(ModelRecipe(path=str(tmp_path / "m")))
    assert str(tmp_path / "m") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ADAPTERS)
def test_an_adapter_s_weights(sound, tmp_path, damage):
    change, said = ADAPTERS[damage]
    shutil.copytree(sound / "adapter", tmp_path / "a")
    change(tmp_path / "a" / "adapter_model.safetensors")
    base = skeleton_of(str(sound / "model"))
    loads = {
        "evaluation and selection": lambda: with_adapters(base, {"a": str(tmp_path / "a")}),
        "vllm": lambda: check_adapter(str(tmp_path / "a"), base),
    }
    if damage == "NaN":
        loads["adapter.start"] = lambda: build_model(
            ModelRecipe(path=str(sound / "model")), AdapterRecipe(start=str(tmp_path / "a"))
        )
    if damage in FILES or damage == "NaN":
        loads["safelora"] = lambda: Adapter(tmp_path / "a")
    for load in loads.values():
        with pytest.raises(UserError, match=said) as caught:
            load()
        assert str(tmp_path / "a") in str(caught.value)


def test_sound_ones_pass_and_an_adapter_of_another_model_does_not(sound):
    for name in ("model", "gpt2"):
        check_checkpoint(ModelRecipe(path=str(sound / name)))
        assert load_base(ModelRecipe(path=str(sound / name))).device.type == "cpu"
    adapted = with_adapters(load_base(ModelRecipe(path=str(sound / "model"))), {"a": str(sound / "adapter")})
    stored = load_file(sound / "adapter" / "adapter_model.safetensors")
    found = dict(adapted.named_parameters())
    assert all(torch.equal(found[n.replace(".weight", ".a.weight")], value) for n, value in stored.items())
    with pytest.raises(UserError, match="not an adapter of this model"):
        check_adapter(str(sound / "adapter"), skeleton_of(str(sound / "gpt2")))


def test_a_sharded_checkpoint_is_whole_or_refused(sound, tmp_path):
    model = load_base(ModelRecipe(path=str(sound / "model")))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    recipe = ModelRecipe(path=str(tmp_path))
    for load in (load_base, check_checkpoint):
        load(recipe)
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    shards[1].rename(tmp_path / "away")
    for load in (load_base, check_checkpoint, lambda r: Checkpoint(tmp_path)):
        with pytest.raises(UserError, match=rf"{shards[1].name}: no such file; {index.name} asks for it"):
            load(recipe)
    (tmp_path / "away").rename(shards[1])
    changed: Any
    for changed in ({"weight_map": {}}, [], {"weight_map": {MATRIX: "../other.safetensors"}}, "[" * 9000):
        index.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        for load in (load_base, check_checkpoint, lambda r: Checkpoint(tmp_path)):
            with pytest.raises(UserError, match=index.name):
                load(recipe)
    index.write_text(json.dumps(told))
    check_checkpoint(recipe)


def test_finite_numbers_whose_sum_is_not_are_finite():
    check_finite([("w", torch.full((4,), 3e38)), ("ids", torch.zeros(2, dtype=torch.int64))], "file")
    with pytest.raises(UserError, match="file: w holds"):
        check_finite([("w", torch.tensor([3e38, 3e38, float("inf")], dtype=torch.bfloat16))], "file")


def test_vectors_and_checkpoints(sound, tmp_path):
    Directions(torch.ones(3, 4), {}).save(tmp_path / "v.safetensors")
    tensors(lambda t: t["vectors"].fill_(float("nan")))(tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="holds numbers that are not finite|no such file"):
        Directions.load(tmp_path / "v.safetensors")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "state.safetensors").write_bytes(LFS)
    with pytest.raises(UserError, match="state.safetensors: a Git LFS pointer"):
        export_adapter(tmp_path / "c", sound / "adapter", tmp_path / "out")
    with pytest.raises(UserError, match="none.safetensors: no such file"):
        read_tensors(tmp_path / "none.safetensors")


def test_safelora_needs_two_models_that_differ(sound, tmp_path):
    for rule in ({"threshold": 0.3}, {"layers": 2}):
        with pytest.raises(UserError, match="have the same weights in every adapted matrix"):
            project_adapter(sound / "adapter", tmp_path / "out", sound / "model", sound / "model", **rule)
    assert not (tmp_path / "out").exists()
    shutil.copytree(sound / "model", tmp_path / "bad")
    MODELS["NaN"][0](tmp_path / "bad" / "model.safetensors")
    for pair in ((tmp_path / "bad", sound / "model"), (sound / "model", tmp_path / "bad")):
        with pytest.raises(UserError, match=f"bad/model.safetensors: {MATRIX} holds numbers that are not finite"):
            project_adapter(sound / "adapter", tmp_path / "out", *pair, threshold=0.3)


def test_a_finished_run_knows_its_adapter(sound, tmp_path):
    run = RunDir(tmp_path)
    shutil.copytree(sound / "adapter", run.adapter)
    run.check_adapter()  # of an earlier version: nothing is known
    run.set_status("finished", adapter=run.describe_adapter())
    run.check_adapter()
    data = run.adapter_weights.read_bytes()
    run.adapter_weights.write_bytes(data[:-1] + b"!")
    run.check_adapter(whole=False)
    with pytest.raises(UserError, match="adapter_model.safetensors: has other bytes: not the adapter.*--no-resume"):
        run.check_adapter()
    run.adapter_weights.write_bytes(data[:-1])
    with pytest.raises(UserError, match="bytes, expected"):
        run.check_adapter(whole=False)
    run.adapter_weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        run.check_adapter(whole=False)
    run.set_status("running", keep=True)
    assert run.status().adapter is None


@pytest.mark.zero3
def test_under_zero3_no_tensor_is_left_over(sound, tmp_path):
    """transformers says there that none is, whatever the file holds."""
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    shutil.copytree(sound / "model", tmp_path / "model")
    tensors(lambda t: t.update(extra=torch.zeros(2)))(tmp_path / "model" / "model.safetensors")
    active = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        with pytest.raises(UserError, match="extra is of no use in this model"):
            load_base(ModelRecipe(path=str(tmp_path / "model")))
        check_names(ModelRecipe(path=str(sound / "model")))
        assert is_deepspeed_zero3_enabled()
    finally:
        del active
