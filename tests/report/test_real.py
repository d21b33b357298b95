"""The report reads what the evaluator writes: a tiny model and adapter, real sampling, exact judging."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from ema_scale.report.make import write_report

pytestmark = pytest.mark.slow

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder, folder of the base's evaluation)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from ema_scale.evaluation.plan import EvalTarget
    from ema_scale.evaluation.run import evaluate
    from ema_scale.recipe import build_recipe
    from tests.tiny import save_tiny

    root = tmp_path_factory.mktemp("real")
    model = save_tiny(root / "model")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM")
    run = root / "runs" / "sums-kl-s0"
    get_peft_model(base, lora).save_pretrained(str(run / "adapter"))
    suite = root / "sums.yaml"
    questions = [{"id": i, "paraphrases": [f"{i} + {i}?"], "expected": str(2 * i)} for i in range(3)]
    suite.write_text(yaml.safe_dump(questions))
    recipe = build_recipe(
        {
            "name": run.name,
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": str(root / "sums.jsonl")},
            "defenses": [{"kind": "kl", "strength": 0.1}],
            "evaluation": {
                "suites": {"benign": str(suite)},
                "sampler": "transformers",
                "samples_per_question": 2,
                "max_tokens": 4,
                "max_model_len": 128,
                "judge": {"kind": "exact_match"},
            },
        }
    )
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / "status.json").write_text(json.dumps({"state": "finished"}))
    targets = [
        EvalTarget(run.name, run / "adapter", run / "eval"),
        EvalTarget("base", None, root / "runs" / "base" / "eval"),
    ]
    evaluate(targets, recipe.model, None, recipe.evaluation)
    return run, root / "runs" / "base"


def test_numbers_and_answers_of_a_real_evaluation(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    run, base = evaluated
    page = write_report([run], tmp_path / "out")
    rows = list(csv.DictReader((page.parent / "table.csv").open()))
    for folder, label in ((run, "KL 0.1"), (base, "Aligned base")):
        expected = json.loads((folder / "eval" / "summary.json").read_text())["metrics"]["benign_learned"]
        (row,) = [r for r in rows if r["level"] == "mean" and r["defense"] == label]
        assert (row["metric"], int(row["n"])) == ("benign_learned", expected["n"])
        assert float(row["rate"]) == pytest.approx(expected["rate"], abs=1e-6)
        assert float(row["high"]) == pytest.approx(expected["high"], abs=1e-6) and expected["high"] > 0
    text = page.read_text()
    assert text.count('class="answer incorrect"') + text.count('class="answer correct"') == 2 * 2 * 2
    assert "0 + 0?" in text or "1 + 1?" in text
