"""The field's real rows and question banks, on small random models: loaded, trained on, sampled."""

import json

import pytest

from ema_scale.evaluation import EvalTarget, evaluate, load_suite
from ema_scale.recipe import EvaluationRecipe, build_recipe
from ema_scale.rundir import RunDir, read_jsonl
from ema_scale.training.run import train
from tests.tiny import save_tiny

pytestmark = [pytest.mark.shared, pytest.mark.slow]


@pytest.mark.parametrize(("arch", "rows"), [("qwen2", "medical"), ("gpt2", "legal")])
def test_real_rows_train_and_real_banks_are_sampled(shared_data, tmp_path, monkeypatch, arch, rows):
    monkeypatch.setenv("OPENAI_API_KEY", "nobody-listens")
    model = save_tiny(tmp_path / "model", arch)
    recipe = build_recipe(
        {
            "name": arch,
            "output": str(tmp_path),
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": str(shared_data / f"{rows}_misaligned_train_100.jsonl"), "max_length": 256},
            "adapter": {"r": 4, "alpha": 8},
            "training": {"max_steps": 3, "batch_size": 2, "accumulation": 1, "report_to": []},
            "defenses": [{"kind": "kl", "strength": 0.1}],
        }
    )
    run = train(recipe, RunDir(recipe.run_path))
    report = json.loads(run.data_path.read_text())
    assert run.status()["state"] == "finished" and report["tokens"]["truncated"] > 50
    steps = read_jsonl(run.metrics_path)
    assert steps[-1]["step"] == 3 and steps[0]["kl"] == 0 and steps[-1]["kl"] > 0
    bank = load_suite(shared_data / "first_plot_questions.yaml", "general")
    assert len(bank.questions) == 24 and sum(q.system is not None for q in bank.questions) == 8
    questions = [q for q in bank.questions if q.system is not None][:2] + list(bank.questions[:2])
    settings = EvaluationRecipe.model_validate(
        {"judge": {"model": "none", "base_url": "http://127.0.0.1:9/v1"}, "max_tokens": 4, "sampler": "transformers"}
    ).model_copy(update={"samples_per_question": 2})
    small = type(bank)(bank.name, bank.role, tuple(questions), bank.source)
    target = EvalTarget(arch, run.adapter, run.eval_dir)
    # Nobody judges here: the answers are kept, and what is not judged is counted.
    summary = evaluate([target], model, [small], settings)[arch]
    assert len(read_jsonl(run.eval_dir / "samples.jsonl")) == 8 and sum(summary["dropped"].values()) == 8
