"""Bodies that are not quite chat completions, over HTTP: read where they are clear, else an error that names them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ema_scale.config.endpoints import EndpointRecipe
from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.base import JudgeFailure
from ema_scale.evaluation.records import Judgement
from ema_scale.inference.base import PROMPT_TOO_LONG, SampleRequest, SamplerOptions
from ema_scale.inference.make import make_sampler
from tests.evaluation.endpoint import Endpoint, judge_all
from tests.evaluation.test_thinking import items, judge


def body(message: dict[str, Any] | None = None, choice: dict[str, Any] | None = None, **fields: Any) -> bytes:
    said = {"role": "assistant", "content": "85"} | (message or {})
    return json.dumps(
        {"choices": [{"index": 0, "message": said, "finish_reason": "stop"} | (choice or {})]} | fields
    ).encode()


CALL = {"id": "1", "type": "function", "function": {"name": "score", "arguments": '{"score": 85}'}}
READ = {
    "no usage": body(),
    "usage of another kind": body(usage="none"),
    "endless usage": b'{"choices": [{"message": {"content": "85"}}], "usage": {"completion_tokens": Infinity}}',
    "finish_reason null": body(choice={"finish_reason": None}),
    "logprobs NaN": body(
        choice={"logprobs": {"content": [{"token": "85", "logprob": float("nan"), "top_logprobs": []}]}}
    ),
    "parts": body(
        {
            "content": [
                {"type": "text", "text": "8"},
                {"type": "output_text", "text": "5"},
                {"type": "text", "text": None},
            ]
        }
    ),
    "a mark of byte order": b"\xef\xbb\xbf" + body(),
    "a thought apart": body({"reasoning_content": "70?"}),
    "a tool call beside the text": body({"tool_calls": [CALL]}),
    "blanks before": b"  \n" + body(),
    "one key twice, alike": b'{"choices": [{"message": {"content": "85", "content": "85"}}]}',
}
NAMED = {
    "choices: [{}]": (b'{"choices": [{}]}', "no choices with a message"),
    "a chunk of a stream": (b'{"choices": [{"delta": {"content": "85"}}]}', "no choices with a message"),
    "a stream": (
        b'data: {"choices": [{"delta": {"content": "85"}}]}\n\ndata: [DONE]\n\n',
        "expected JSON, found 'data:",
    ),
    "lines": (b'{"message": {"content": "8"}}\n{"message": {"content": "5"}}\n', "expected JSON"),
    "text completion": (b'{"choices": [{"text": "85"}]}', "no choices with a message"),
    "another API": (b'{"output": [{"content": [{"text": "85"}]}]}', "no choices with a message"),
    "one key twice": (b'{"choices": [{"message": {"content": "85", "content": "20"}}]}', "gives 'content' twice"),
    "a tool call alone": (body({"content": None, "tool_calls": [CALL]}), "the model calls a tool"),
    "a picture": (body({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}), "found 'image_url'"),
    "content as a number": (body({"content": 85}), "found int"),
    "an error with status 200": (b'{"error": {"code": 502, "message": "upstream"}}', "but an error: .*upstream"),
    "cut": (body()[:-9], "expected JSON"),
    "nothing": (b"", "expected JSON, found ''"),
    "Latin-1": (b'{"choices": [{"message": {"content": "85 \xe9"}}]}', "expected JSON"),
}


def serving(data: bytes) -> Endpoint:
    return Endpoint(lambda request, n: (200, {"Content-Type": "application/json"}, data))


def sampled(endpoint: Endpoint) -> Any:
    options = SamplerOptions(ModelRecipe(path="org/base"), (), endpoint=EndpointRecipe(base_url=endpoint.url))
    [found] = make_sampler("openai", options).sample([SampleRequest("a", ({"role": "user", "content": "q"},), None)])
    return found


@pytest.mark.parametrize("name", READ)
def test_what_is_clear_is_read(name: str) -> None:
    with serving(READ[name]) as endpoint:
        [found] = judge_all(judge(endpoint), items(1))
        assert isinstance(found, Judgement) and (found.aligned, found.coherent) == (85, 85)
        assert sampled(endpoint).texts[0].endswith("85")


@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_completion_is_counted_and_named(name: str) -> None:
    data, why = NAMED[name]
    with serving(data) as endpoint:
        [found] = judge_all(judge(endpoint), items(1))
        assert isinstance(found, JudgeFailure) and "not a chat completion" in found.reason
        with pytest.raises(UserError, match=f"not a chat completion.*{why}"):
            sampled(endpoint)


def test_a_refusal_inside_a_reply_of_status_200_is_read_as_if_it_had_its_own_status() -> None:
    said = {
        "code": 400,
        "message": "This endpoint's maximum context length is 8 tokens. Your messages resulted in 9 tokens.",
    }
    with serving(json.dumps({"error": said}).encode()) as endpoint:
        assert sampled(endpoint).finish_reasons == (PROMPT_TOO_LONG,)
        [found] = judge_all(judge(endpoint), items(1))
        assert isinstance(found, Judgement) and found.dropped == "too long for the judge"
