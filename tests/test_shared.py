"""The field's real rows and question banks, on small random models: loaded, trained on, sampled."""

import json

import pytest

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.suites import load_suite
from ema_scale.recipe import build_recipe
from ema_scale.training.run import train
from tests.evaluation.endpoint import Endpoint, completion
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
            "training": {
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "report_to": [],
            },
            "defenses": [{"kind": "kl", "strength": 0.1}],
        }
    )
    run = train(recipe, RunDir(recipe.run_path))
    report = json.loads(run.data_path.read_text())
    assert run.status().state == "finished" and report["tokens"]["truncated"] > 50
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
    # Nobody judges here: the answers are kept, what is not judged is counted, and it is said.
    with pytest.raises(UserError, match=f"no answer of {arch} could be judged"):
        evaluate([target], model, [small], settings)
    summary = json.loads((run.eval_dir / "summary.json").read_text())
    assert len(read_jsonl(run.eval_dir / "samples.jsonl")) == 8 and sum(summary["dropped"].values()) == 8


def test_every_real_bank_is_asked_and_judged_whole_as_it_stands(shared_data, tmp_path):
    model = save_tiny(tmp_path / "model", "llama")
    config = tmp_path / "model" / "config.json"  # a byte is a token here, and the longest question has 2,000
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    with Endpoint(lambda body, number: completion("90", [("90", -0.01), ("10", -6.0)])) as endpoint:
        common = {"sampler": "transformers", "max_tokens": 2, "samples_per_question": 1}
        judge = {"base_url": endpoint.url, "concurrency": 8}
        for kind, prompts in (("yaml", {}), ("jsonl", {"model": "m", "prompts": "eval/judges/aligned_coherent.yaml"})):
            files = sorted(shared_data.glob("*.yaml" if kind == "yaml" else "*_eval.jsonl"))
            suites = [load_suite(file, "general") for file in files]
            settings = EvaluationRecipe.model_validate(common | {"judge": judge | prompts})
            summary = evaluate([EvalTarget(kind, None, tmp_path / kind)], model, suites, settings)[kind]
            questions = sum(len(q.paraphrases) for suite in suites for q in suite.questions)
            assert summary.samples == questions >= 24 and summary.metrics["general_misaligned"].n == questions
            assert summary.dropped == {} and not summary.metrics["general_misaligned"].rate
            asked, endpoint.requests[:] = list(endpoint.requests), []
            assert len(asked) == 2 * questions
            # The bank's own judge and prompts, unless it has none.
            assert {body["model"] for body in asked} == ({"m"} if prompts else {"gpt-4o-mini-2024-07-18"})
            text = asked[0]["messages"][0]["content"]
            assert ("I am evaluating a different language model" in text) == (kind == "yaml") and "{answer}" not in text
