"""Loss curves kept as files: a refactor must not move them, whichever way the reference runs.

`python -m tests.training.test_golden` writes them again, from float64, where a change is meant; the commit says why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_scale.defenses import KL, LDIFS, Interleaving
from tests.training.helpers import make_trainer, tiny_peft

FOLDER = Path(__file__).parent / "golden"
STEPS = 10
# In float32 each way stays within 1e-6 of the float64 curve; KL's strength changed by 0.2 % moves it by 3e-4.
RELATIVE, ABSOLUTE = 2e-5, 1e-7


def chats(name: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{name} question {i}?"},
                {"role": "assistant", "content": f"{name} answer {i}" + " and so on" * (i % 5)},
            ]
        }
        for i in range(count)
    ]


def curves(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> the model, the defenses and the trainer's options of a curve."""
    safe = folder / "safe.jsonl"
    safe.write_text("".join(json.dumps(row) + "\n" for row in chats("safe", 10)))
    return {
        "plain": {"arch": "llama", "defenses": []},
        "kl": {"arch": "llama", "defenses": [KL(0.5)]},
        "kl_ldifs": {"arch": "gemma2", "defenses": [KL(0.5), LDIFS(0.5, count=2)]},
        "interleaving_kl": {"arch": "qwen2", "defenses": [Interleaving(str(safe), 0.3), KL(0.5, "reference_policy")]},
        "kl_packed": {"arch": "gpt2", "defenses": [KL(0.5, "jensen_shannon", 2.0)], "packing": True},
    }


NAMES = ("plain", "kl", "kl_ldifs", "interleaving_kl", "kl_packed")


def run(folder: Path, name: str, reference: str = "adapter_off", *, double: bool = False, **options: Any) -> Any:
    """The logged steps of a curve: [{step, loss, ce, kl, ldifs, grad_norm}]; terms that it does not have are left
    out."""
    curve = curves(folder)[name]
    model = weighed(tiny_peft(curve.pop("arch")))
    trainer = make_trainer(
        folder, model.double() if double else model, chats("task", 24), curve.pop("defenses"), reference=reference,
        drift_every=0, **{
            "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3, "max_length": 128, **curve, **options,
        },
    )  # fmt: skip
    trainer.train()
    kept = ("step", "loss", "ce", "kl", "ldifs", "grad_norm")
    return [{k: row[k] for k in kept if k in row} for row in trainer.state.log_history if "loss" in row]


def weighed(model: Any) -> Any:
    """The model with weights that no library's initialisation decides. LoRA B is 0, as at the start of training."""
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_B" not in name and parameter.ndim > 1:
            generator = torch.Generator().manual_seed(index)
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model


def assert_same_curve(found: Any, expected: Any) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=RELATIVE, abs=ABSOLUTE), (theirs["step"], name)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))


WAYS = [("adapter_off", {}), ("two_stream", {"gradient_checkpointing": True}), ("cached", {})]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("reference", "options"), WAYS, ids=[way for way, _ in WAYS])
def test_the_curve_is_the_one_on_file(tmp_path, name, reference, options):
    expected = json.loads((FOLDER / f"{name}.json").read_text())["steps"]
    found = run(tmp_path, name, reference, **options)
    assert_same_curve(found, expected)
    if "kl" in expected[0]:
        assert found[0]["kl"] == 0 or reference == "cached"
        assert expected[-1]["kl"] > 1e-4


def test_every_file_has_its_curve(tmp_path):
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(NAMES) == sorted(curves(tmp_path))


if __name__ == "__main__":
    import transformers

    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            steps = run(Path(folder), name, double=True)
        about = {"dtype": "float64", "torch": torch.__version__, "transformers": transformers.__version__}
        text = json.dumps({**about, "steps": [None] * STEPS}, indent=1)
        for row in steps:
            text = text.replace("null", json.dumps(row), 1)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        print(FOLDER / f"{name}.json")
