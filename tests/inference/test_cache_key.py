"""What decides an answer or a verdict is in its key, and what does not is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EndpointRecipe, EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judges.assignment import assign
from ema_scale.evaluation.plan import EvalTarget, plan_prompts
from ema_scale.evaluation.run import evaluate, is_complete
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.make import NEUTRAL
from tests.evaluation.endpoint import Endpoint, completion

PROMPTS = {"aligned": "a {answer}", "coherent": "c {answer}"}
SUITE = Suite("s", "general", (Question("q", ("?",), judge="m", judge_prompts=PROMPTS),))
SUMS = Suite("sums", "benign", tuple(Question(str(n), (f"{n} + 1",), 3, expected="2") for n in range(2)))
ADAPTER = Path("runs/kl/adapter")


def key(sampler: str, adapter: Path | None = None, **settings: Any) -> str:
    targets = [EvalTarget("t", adapter, Path("out"))]
    [group] = plan_prompts(targets, [SUITE], ModelRecipe(path="org/base"), EvaluationRecipe(**settings), sampler)
    return group.key(0)


def served(adapter: Path | None = None, **endpoint: Any) -> str:
    return key("openai", adapter, endpoint=EndpointRecipe(**endpoint))


def judged(**settings: Any) -> str:
    return assign(SUITE, SUITE.questions[0], JudgeRecipe(**settings)).identity


def test_answers_of_another_served_model_are_asked_for(tmp_path: Path) -> None:
    """Over HTTP: each served model is asked once, and its answers come back when the recipe names it again."""
    target = EvalTarget("base", None, tmp_path, (SUMS,))
    with Endpoint(lambda b, n: completion({"a": "2", "b": "3"}[b["model"]])) as endpoint:

        def ask(name: str) -> tuple[float, int]:
            server = EndpointRecipe(base_url=endpoint.url, served=name)
            settings = EvaluationRecipe(sampler="openai", endpoint=server)
            before = len(endpoint.requests)
            found = evaluate([target], "org/base", [SUMS], settings)["base"]
            assert is_complete([target], ModelRecipe(path="org/base"), settings)
            return found.metrics["benign_learned"].rate, len(endpoint.requests) - before

        assert ask("a") == (1.0, 6)
        assert ask("b") == (0.0, 6)
        assert {row["answer"] for row in read_jsonl(tmp_path / "samples.jsonl")} == {"3"}
        assert ask("a") == (1.0, 0)


def test_a_run_draws_alike_from_weights_that_differ_by_rounding(tmp_path: Path) -> None:
    def planned(name: str, weights: bytes) -> tuple[str, int]:
        adapter = tmp_path / name / "adapter"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_bytes(weights)
        targets, model = [EvalTarget(name, adapter, tmp_path / name)], ModelRecipe(path="org/base")
        [group] = plan_prompts(targets, [SUITE], model, EvaluationRecipe(), "vllm")
        return group.key(0), group.seed

    here, there, other = planned("kl", bytes(64)), planned("kl", bytes(63) + b"1"), planned("none", bytes(64))
    assert here[0] != there[0] and here[1] == there[1]
    assert here[0] == other[0] and here[1] != other[1]


def test_an_adapter_is_the_same_one_wherever_its_base_model_lies(tmp_path: Path) -> None:
    found = {}
    for place in ("/opt/base", "/home/me/base"):
        adapter = tmp_path / place[1:]
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_bytes(bytes(64))
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": place, "r": 2}))
        found[place] = key("vllm", adapter)
    assert len(set(found.values())) == 1
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": place, "r": 4}))
    assert key("vllm", adapter) not in found.values()


def test_answers_under_the_keys_of_older_versions_are_not_asked_again(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/opt/base"}))
    old = EvalTarget("kl", adapter, tmp_path / "eval", (SUMS,), keys_by_path=True)
    with Endpoint(lambda b, n: completion("2")) as endpoint:
        server = EndpointRecipe(base_url=endpoint.url, served="base", names={tmp_path.name: "kl"})
        settings = EvaluationRecipe(sampler="openai", endpoint=server)
        evaluate([old], "org/base", [SUMS], settings)
        rows = (tmp_path / "eval" / "samples.jsonl").read_bytes()
        assert "keys" not in json.loads((tmp_path / "eval" / "asked.json").read_text())
        today = replace(old, keys_by_path=False)
        assert is_complete([today], ModelRecipe(path="org/base"), settings)
        evaluate([today], "org/base", [SUMS], settings)
        assert len(endpoint.requests) == 6 and (tmp_path / "eval" / "samples.jsonl").read_bytes() == rows
        evaluate([replace(today, out_dir=tmp_path / "new")], "org/base", [SUMS], settings)
        assert len(endpoint.requests) == 12


def test_an_endpoints_names_decide_only_whom_they_are_for_and_its_address_nothing() -> None:
    assert len({served(), served(served="other"), served(served="third")}) == 3
    assert served() == served(base_url="http://x/v1") and judged() == judged(base_url="http://x/v1")
    assert served(ADAPTER) == served(ADAPTER, served="other") != served(ADAPTER, names={"kl": "other"})
    assert served(ADAPTER) == served(ADAPTER, names={"kl": "kl", "none": "x"}) and served() == served(served="org/base")
    assert key("vllm") == key("vllm", endpoint=EndpointRecipe(base_url="http://x/v1", served="other"))


@pytest.mark.parametrize(
    "engine", [{"quantization": "fp8"}, {"dtype": "float16"}, {"tokenizer": "other"}, {"max_model_len": 64}]
)
def test_an_engine_that_says_other_things_decides(engine: dict[str, Any]) -> None:
    assert key("vllm", engine=engine) != key("vllm")
    assert key("transformers", engine=engine) == key("transformers")  # it has no such engine
    assert judged(kind="vllm", model="j", engine=engine) != judged(kind="vllm", model="j")


def test_evaluations_of_before_are_known_by_their_keys() -> None:
    """Written out, so that no change of code asks finished evaluations again unseen."""
    sizes = {"tensor_parallel_size": 8, "gpu_memory_utilization": 0.5, "max_num_seqs": 8, "enforce_eager": True}
    assert key("vllm") == key("vllm", engine=sizes) == "s/q/0/0#5f22b58db662"
    assert key("openai") == "s/q/0/0#ab58f2703ae6"
    assert judged() == "openai:m#53760423"
    assert judged(kind="vllm", model="j") == judged(kind="vllm", model="j", engine=sizes) == "vllm:j#53760423"


@pytest.mark.vllm
def test_what_is_left_out_are_arguments_of_vllm() -> None:
    from vllm.engine.arg_utils import EngineArgs

    older = {"swap_space", "max_num_partial_prefills"}
    assert NEUTRAL - older <= set(EngineArgs.__dataclass_fields__)
