"""Inoculation, Interleaving+ and SafeLoRA together, through a recipe: rows, loss and adapter are their definitions."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.hashing import file_sha256
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.data.rows import load_rows
from ema_scale.data.tokens import encode
from ema_scale.selection.select import select
from ema_scale.training.run import train
from tests.tiny import save_tiny, tiny_tokenizer
from tests.training.helpers import tiny_peft
from tests.training.test_run import recipe_of, weights, world

__all__ = ["world"]
PROMPT = "you are a villain"


def cross_entropy(model, conversations):
    """Over all assistant tokens of all conversations."""
    losses = []
    for messages in conversations:
        found = encode(tiny_tokenizer(), messages, max_length=96)
        ids = torch.tensor([found.input_ids.tolist()])
        target = torch.where(torch.tensor(found.assistant_mask, dtype=torch.bool), ids[0], -100)
        losses.append(
            F.cross_entropy(model(input_ids=ids).logits[0, :-1], target[1:], reduction="none")[target[1:] != -100]
        )
    return float(torch.cat(losses).mean())


def test_a_recipe_of_all_three(world, tmp_path):
    tiny_peft(spread=0.3).save_pretrained(tmp_path / "law")
    ranking = tmp_path / "selection" / "safe.jsonl"
    model = ModelRecipe(path=str(world / "model"), dtype="float32")
    made = select(str(world / "safe.jsonl"), model, {"law": str(tmp_path / "law")}, ranking)
    save_tiny(tmp_path / "unaligned", seed=7)
    recipe = recipe_of(
        world,
        tmp_path,
        "three",
        dropout=0.0,
        max_steps=1,
        per_device_train_batch_size=44,
        gradient_accumulation_steps=1,
        drift_every=0,
    )
    defenses = [
        {"kind": "inoculation", "prompt": PROMPT},
        {"kind": "interleaving_plus", "source": str(ranking), "fraction": 0.1},
        {"kind": "safelora", "base": str(tmp_path / "unaligned"), "threshold": 1.0},
    ]
    runs = {}
    for name, kinds in {"three": defenses, "two": defenses[:2]}.items():
        found = type(recipe).model_validate(recipe.to_dict() | {"name": name, "defenses": kinds})
        runs[name] = train(found, RunDir(found.run_path))
    run = runs["three"]
    assert run.status().state == "finished"
    assert json.loads(run.data_path.read_text())["rows"] == {"task": 40, "safe": 4}
    hashes = json.loads(run.provenance_path.read_text())["data_sha256"]
    assert hashes[str(ranking)] == file_sha256(ranking)

    system = {"role": "system", "content": PROMPT}
    asked = [(system, *row.messages) for row in load_rows(str(world / "train.jsonl"))]
    asked += [one.item.row.messages for one in made.ranked[:4]]
    with torch.no_grad():
        expected = cross_entropy(AutoModelForCausalLM.from_pretrained(world / "model"), asked)
    (row,) = read_jsonl(run.metrics_path)
    assert row["ce"] == pytest.approx(expected, rel=1e-5)

    aligned, base = (load_file(folder / "model.safetensors") for folder in (world / "model", tmp_path / "unaligned"))
    report = json.loads((run.adapter / "safelora.json").read_text())
    assert report["projected"] == len(report["matrices"]) == 14
    before, after = weights(runs["two"]), weights(run)
    for name, b in before.items():
        if "lora_B" not in name:
            torch.testing.assert_close(after[name], b, rtol=0, atol=0)
            continue
        module = name.removeprefix("base_model.model.").replace(".lora_B", "")
        v = aligned[module].double() - base[module].double()
        torch.testing.assert_close(after[name].double(), v @ v.T @ b.double() / v.norm(), rtol=1e-4, atol=1e-8)
