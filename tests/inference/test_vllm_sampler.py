"""Real vLLM, one engine for the whole module: a base model and three adapters in the same batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_scale.config.sections import EvaluationRecipe, ModelRecipe
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.base import PROMPT_TOO_LONG, SampleRequest, SamplerOptions
from ema_scale.inference.make import make_sampler
from tests.evaluation.conftest import TinyModels

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

QUESTIONS = [
    f"{word} {i}?" for i, word in enumerate(("What is love", "Who are you", "Tell me more", "Why", "How", "Is it so"))
]


def environment() -> dict[str, str]:
    """What a process started later would be led astray by."""
    names = (
        "LD_PRELOAD",
        "LOCAL_WORLD_SIZE",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "TORCHINDUCTOR_COMPILE_THREADS",
    )
    return {name: os.environ[name] for name in names if name in os.environ}


@pytest.fixture(scope="module")
def engine(tiny_models: TinyModels) -> Iterator[Any]:
    before = environment()
    options = SamplerOptions(ModelRecipe(path=tiny_models.model), tiny_models.adapters, max_model_len=256)
    sampler = make_sampler("auto", options)
    assert sampler.name == "vllm"
    yield sampler
    sampler.close()
    assert environment() == before


def requests(world: TinyModels, **settings: Any) -> list[SampleRequest]:
    """Every question to every target, targets alternating, so that each batch is mixed."""
    return [
        SampleRequest(f"{q}/{t}", ({"role": "user", "content": question},), target, **settings)
        for q, question in enumerate(QUESTIONS)
        for t, target in enumerate(world.targets)
    ]


def test_a_mixed_batch_equals_transformers_and_peft(tiny_models: TinyModels, engine: Any) -> None:
    asked = requests(tiny_models, temperature=0.0, max_tokens=24)
    got = {r.key: r for r in engine.sample(asked)}
    options = SamplerOptions(ModelRecipe(path=tiny_models.model), tiny_models.adapters, max_model_len=256)
    with make_sampler("transformers", options) as reference:  # type: ignore[attr-defined]
        expected = {r.key: r for r in reference.sample(asked)}
    assert got == expected
    # The comparison says something only if the adapters change what is said.
    for q in range(len(QUESTIONS)):
        assert len({got[f"{q}/{t}"].texts for t in range(4)}) == 4


def test_an_answer_depends_on_its_seed_and_on_nothing_else(tiny_models: TinyModels, engine: Any) -> None:
    whole = {r.key: r for r in engine.sample(requests(tiny_models, n=4, seed=100, max_tokens=16))}
    later = {r.key: r for r in engine.sample(reversed(requests(tiny_models, n=2, seed=102, max_tokens=16)))}
    assert {k: r.texts[2:] for k, r in whole.items()} == {k: r.texts for k, r in later.items()}
    assert len({text for r in whole.values() for text in r.texts}) > 90


def test_more_prompt_tokens_than_fit_in_a_step(tiny_models: TinyModels, engine: Any) -> None:
    budget = engine._engine.engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = ["".join(chr(97 + (i * j) % 26) for j in range(200)) for i in range(1, budget // 200 + 10)]
    asked = [
        SampleRequest(f"{i}", ({"role": "user", "content": p},), tiny_models.targets[i % 4], n=2, seed=i, max_tokens=4)
        for i, p in enumerate(prompts)
    ]
    found = {r.key: r for r in engine.sample(asked)}
    assert len(found) == len(asked)
    [alone] = engine.sample(asked[-1:])
    assert alone == found[alone.key]


def test_answers_come_while_the_engine_still_works(tiny_models: TinyModels, engine: Any) -> None:
    short = SampleRequest("short", ({"role": "user", "content": "a"},), max_tokens=1)
    long = SampleRequest("long", ({"role": "user", "content": "b"},), max_tokens=100, temperature=0.0)
    stream = engine.sample([long, short])
    assert next(stream).key == "short"
    stream.close()  # a caller that stops early leaves nothing behind
    assert not engine._engine.engine.has_unfinished_requests()


def test_a_prompt_that_leaves_no_room_is_reported(tiny_models: TinyModels, engine: Any) -> None:
    asked = SampleRequest("k", ({"role": "user", "content": "x" * 300},), tiny_models.adapters[0], n=2)
    [result] = engine.sample([asked])
    assert result.finish_reasons == (PROMPT_TOO_LONG,) * 2 and result.texts == ("", "")


def test_an_evaluation_of_base_and_adapters_in_one_engine(tmp_path: Path, tiny_models: TinyModels, engine: Any) -> None:
    suite = Suite("sums", "benign", tuple(Question(str(i), (f"{i} + 1 =",), 6, expected=str(i + 1)) for i in range(4)))
    targets = [
        EvalTarget(f"t{i}", Path(path) if path else None, tmp_path / f"t{i}")
        for i, path in enumerate(tiny_models.targets)
    ]
    settings = EvaluationRecipe(sampler="vllm", max_tokens=16, samples_per_question=2)
    evaluate(targets, tiny_models.model, [suite], settings, sampler=engine)
    settings = settings.model_copy(update={"samples_per_question": None})
    found = evaluate(targets, tiny_models.model, [suite], settings, sampler=engine)
    assert [s.samples for s in found.values()] == [24] * 4
    assert found["t0"].sampler["name"] == "vllm" and found["t0"].sampler["dtype"] == "float32"
    # The same answers come from a run that was never interrupted, whatever shared the batch.
    alone = [EvalTarget("t2", targets[2].adapter_path, tmp_path / "alone")]
    evaluate(alone, tiny_models.model, [suite], settings, sampler=engine)
    first, second = (
        {r["key"]: r["answer"] for r in read_jsonl(tmp_path / f / "samples.jsonl")} for f in ("t2", "alone")
    )
    assert first == second and len(first) == 24


def test_closing_gives_everything_back(engine: Any) -> None:
    """Another engine opens in the same process afterwards: test_judge_vllm.py has a policy and a judge take turns."""
    engine.close()
    engine.close()
    assert torch.get_num_threads() >= 1 and torch.set_num_threads.__name__ == "set_num_threads"
    assert not torch.distributed.is_initialized()
