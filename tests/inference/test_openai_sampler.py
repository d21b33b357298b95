"""A server that runs already as the sampler, and reasoning kept apart from answers whatever sampled them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EndpointRecipe, EvaluationRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judging.pool import stored_answer
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.records import Sample
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.base import PROMPT_TOO_LONG, SampleRequest, SamplerOptions
from ema_scale.inference.chat_prompts import Prompts
from ema_scale.inference.make import make_sampler
from tests.evaluation.endpoint import Endpoint, completion, error
from tests.tiny import CHATML, save_tiny, tiny_model, tiny_tokenizer


def answered(text: str | None, reason: str = "stop", **message: Any) -> Any:
    status, headers, body = completion(text)
    values = json.loads(body)
    values["choices"][0]["message"] |= message
    values["choices"][0]["finish_reason"] = reason
    return status, headers, json.dumps(values | {"usage": {"completion_tokens": 7, "total_tokens": 9}}).encode()


def sampler(endpoint: Endpoint, *adapters: str, **settings: Any) -> Any:
    recipe = EndpointRecipe(base_url=endpoint.url, **settings)
    return make_sampler("openai", SamplerOptions(ModelRecipe(path="org/base"), adapters, endpoint=recipe))


ASKED = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})


def test_every_answer_is_asked_for_with_its_own_seed_and_by_its_adapters_name() -> None:
    with Endpoint(lambda b, n: answered(f"{b['model']} {b['seed']}"), delay=0.02) as endpoint:
        drawn = sampler(endpoint, "runs/kl/adapter", "elsewhere/lora", names={"lora": "L"}, concurrency=3)
        requests = [
            SampleRequest("a", ASKED, None, n=3, seed=10, temperature=0.5, top_p=0.9, max_tokens=5),
            SampleRequest("b", ASKED, "runs/kl/adapter", n=2, seed=0),
            SampleRequest("c", ASKED, "elsewhere/lora"),
        ]
        found = {r.key: r for r in drawn.sample(requests)}
        assert endpoint.most_at_once == 3
    assert found["a"].texts == ("org/base 10", "org/base 11", "org/base 12") and found["a"].token_counts == (7,) * 3
    assert found["b"].texts == ("kl 0", "kl 1") and found["c"].texts == ("L 0",)
    first = next(b for b in endpoint.requests if b["seed"] == 10)
    assert first["messages"] == list(ASKED) and (first["temperature"], first["top_p"]) == (0.5, 0.9)
    assert first["max_tokens"] == 5


def test_prompts_too_long_and_names_unknown() -> None:
    with Endpoint(lambda b, n: error(400, "maximum context length is 8")) as endpoint:
        [found] = sampler(endpoint).sample([SampleRequest("a", ASKED, n=2)])
        assert found.finish_reasons == (PROMPT_TOO_LONG,) * 2
    with Endpoint(lambda b, n: error(404, "no such model")) as endpoint:
        with pytest.raises(UserError, match=f"{endpoint.url}.*'org/base'.*no such model"):
            list(sampler(endpoint).sample([SampleRequest("a", ASKED, n=2)]))
    with Endpoint(lambda b, n: error(404, "nothing here")) as endpoint:
        endpoint.url = endpoint.url.removesuffix("/v1")
        with pytest.raises(UserError, match=f"most servers want /v1 at the end of {endpoint.url}"):
            list(sampler(endpoint).sample([SampleRequest("a", ASKED)]))
    with pytest.raises(UserError, match="endpoint.base_url: not set"):
        make_sampler("openai", SamplerOptions(ModelRecipe(path="m"), endpoint=EndpointRecipe()))


@pytest.mark.parametrize(
    "body",
    [b'{"choices": null}', b'{"choices": []}', b'{"choices": [{"index": 0}]}', b"<html>", b"{]", b"[1]", b"null"],
)
def test_a_reply_that_is_no_completion_is_an_error_for_people(body: bytes) -> None:
    with Endpoint(lambda b, n: (200, {"Content-Type": "application/json"}, body)) as endpoint:
        with pytest.raises(UserError, match=f"{endpoint.url}, model 'org/base': .*; what was sampled is kept"):
            list(sampler(endpoint).sample([SampleRequest("a", ASKED, n=2)]))


def test_reasoning_is_kept_apart_and_the_answer_judged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Split off by the server, written by the model, or never ended: base model only, nothing on this machine."""

    def respond(body: dict[str, Any], n: int) -> Any:
        kind = body["messages"][-1]["content"]
        if kind == "split":
            return answered("4", reasoning_content="2 + 2 is 5?")
        if kind == "written":
            return answered("<think>5, no</think>\n\n4")
        if kind == "empty thought":  # Qwen3's template writes it into every answer
            return answered("<think>\n\n</think>\n\n4")
        if kind == "only a thought":
            return answered("<think>4</think>")
        if kind == "endless":
            return answered(None, "length", reasoning="and on")
        return answered("4")

    kinds = ("split", "written", "empty thought", "only a thought", "endless", "plain")
    suite = Suite("s", "benign", tuple(Question(k, (k,), 2, expected="4") for k in kinds))
    with Endpoint(respond) as endpoint:
        server = EndpointRecipe(base_url=endpoint.url, price_output=1000)
        settings = EvaluationRecipe(sampler="openai", endpoint=server)
        caplog.set_level("INFO")
        found = evaluate([EvalTarget("base", None, tmp_path)], "org/base", [suite], settings)["base"]
        evaluate([EvalTarget("base", None, tmp_path)], "org/base", [suite], settings)
        assert len(endpoint.requests) == 12
        before, after = (r.getMessage() for r in caplog.records if "at the recipe's prices" in r.getMessage())
        assert f"{endpoint.url} will take 12 calls" in before and "7,200 written, about 7.20 at" in before
        assert f"{endpoint.url} took 12 calls, about" in after and "84 written, about 0.08 at" in after
    assert found.metrics["benign_learned"].rate == 1.0 and found.dropped == {"unfinished reasoning": 4}
    rows = {r["question_id"]: (r["reasoning"], r["answer"]) for r in read_jsonl(tmp_path / "samples.jsonl")}
    assert rows == {
        "split": ("2 + 2 is 5?", "4"),
        "written": ("5, no", "4"),
        "empty thought": ("", "4"),
        "only a thought": ("4", ""),
        "endless": ("and on", ""),
        "plain": (None, "4"),
    }
    assert found.sampler["served"] == "org/base" and all(s["seed"] for s in read_jsonl(tmp_path / "samples.jsonl"))


def row(**values: str) -> Sample:
    return Sample.model_validate({"key": "k", "suite": "s", "question_id": "q", "question": "?"} | values)


def test_rows_of_before_are_split_when_they_are_judged() -> None:
    assert stored_answer(row(answer="<think>a</think>b", finish_reason="stop")) == ("a", "b", True)
    assert stored_answer(row(answer="", reasoning="a", finish_reason="length")) == ("a", "", False)
    # A template may open the thought; a model that never closes it has said nothing that could be judged.
    assert stored_answer(row(answer="", reasoning="a", finish_reason="stop")) == ("a", "", False)
    assert stored_answer(row(answer="", reasoning="", finish_reason="stop")) == ("", "", False)
    assert stored_answer(row(answer="", finish_reason="stop")) == ("", "", True)


def test_a_template_that_opens_the_reasoning_is_seen(tmp_path: Path) -> None:
    template = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>\n' }}{% endif")
    assert template != CHATML
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer(template).save_pretrained(tmp_path)
    prompts = Prompts(ModelRecipe(path=str(tmp_path)))
    assert prompts.opening(prompts.ids(ASKED)) == "<think>"
    plain = Prompts(ModelRecipe(path=save_tiny(tmp_path / "plain")))
    assert plain.opening(plain.ids(ASKED)) == ""
    options = SamplerOptions(ModelRecipe(path=str(tmp_path)), max_model_len=128)
    with make_sampler("transformers", options) as opened:  # type: ignore[attr-defined]
        [found] = opened.sample([SampleRequest("k", ASKED, max_tokens=4)])
    assert found.texts[0].startswith("<think>")
