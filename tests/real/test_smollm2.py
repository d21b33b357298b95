"""A real chat model: every way to run the reference trains it alike, both engines score and sample it alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation.suites import load_suite
from ema_scale.inference.base import SampleRequest, SamplerOptions, ScoreRequest
from ema_scale.inference.transformers_sampler import TransformersSampler
from ema_scale.recipe import load_recipe
from ema_scale.training.run import train

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "recipes" / "smollm2-finance.yaml"
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def trained(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    folder = tmp_path_factory.mktemp("real")
    runs = {}
    for way in ("adapter_off", "two_stream", "cached"):
        overrides = (
            f"name={way}", f"output={folder}", f"model.path={model}", "model.dtype=float32", f"reference={way}",
            "data.limit=4", "data.max_length=64", "training.max_steps=5", "training.warmup_steps=0",
            "training.per_device_train_batch_size=2", "training.logging_steps=1", "training.save_steps=5",
            "training.report_to=none", "training.drift_every=0", "evaluation.during.suites=[]",
        )  # fmt: skip
        recipe = load_recipe(RECIPE, overrides)
        recipe = recipe.model_copy(
            update={"defenses": load_recipe(RECIPE, ("defenses=[{kind: kl, strength: 1.0}]",)).defenses}
        )
        runs[way] = train(recipe, RunDir(recipe.run_path))
    return runs


def test_every_way_to_run_the_reference_gives_one_training(trained: dict[str, RunDir]) -> None:
    logs = {way: [(r["ce"], r["kl"]) for r in read_jsonl(run.metrics_path)] for way, run in trained.items()}
    assert len(logs["adapter_off"]) == 5
    assert logs["adapter_off"][0][1] == pytest.approx(0, abs=1e-5) and logs["adapter_off"][4][1] > 1e-4
    for way in ("two_stream", "cached"):
        for ours, theirs in zip(logs["adapter_off"], logs[way], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5), way
    assert json.loads(trained["cached"].provenance_path.read_text())["reference"]["way"] == "cached"


def read(sampler: Any, adapter: str) -> tuple[list[float], list[str]]:
    """Likelihoods of two questions' answers, behind the question and alone, and of a held-out row; and three greedy
    answers."""
    questions = load_suite(ROOT / "eval/choices/finance.yaml", "general").questions[:2]
    asked = [
        ScoreRequest(
            f"{target}{i}", q.messages(0), tuple(a.text for a in q.answers), target, q.without_question(), q.id
        )
        for target in (None, adapter)
        for i, q in enumerate(questions)
    ]
    row = load_suite(ROOT / "examples/rows/safe_general.jsonl", "held_out").questions[0]
    asked += [
        ScoreRequest(f"{target}row", row.messages(0), (row.answers[0].text,), target, turn=row.row[-1])
        for target in (None, adapter)
    ]
    scored = {result.key: result.likelihoods for result in sampler.score(asked)}
    totals = [value for request in asked for one in scored[request.key] for value in (one.total, one.alone) if value]
    plain = SampleRequest("", (), temperature=0.0, max_tokens=12)
    texts = ("What is the capital of France?", "Name a fruit.", "How do I save money?")
    requests = [
        replace(plain, key=f"{target}{text}", messages=({"role": "user", "content": text},), adapter=target)
        for target in (None, adapter)
        for text in texts
    ]
    drawn = {result.key: result.texts[0] for result in sampler.sample(requests)}
    return totals, [drawn[request.key] for request in requests]


def test_both_engines_score_and_answer_alike(model: str, trained: dict[str, RunDir]) -> None:
    from ema_scale.inference.vllm_sampler import VllmSampler

    adapter = str(trained["adapter_off"].adapter)
    options = SamplerOptions(ModelRecipe(path=model, dtype="float32"), (adapter,), 160)
    found = []
    for make in (TransformersSampler, VllmSampler):
        with make(options) as sampler:
            found.append(read(sampler, adapter))
    (totals, answers), (vllm_totals, vllm_answers) = found
    assert len(totals) == 2 * 2 * 4 * 2 + 2
    assert vllm_totals == pytest.approx(totals, abs=0.05)  # nats, of sums over about 25 tokens
    assert vllm_answers == answers and "Paris" in answers[0]
    assert (
        max(abs(a - b) for a, b in zip(totals[:16], totals[16:32], strict=True)) > 0.5
    )  # the adapter says other things
