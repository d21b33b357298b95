"""Servers that misbehave, over HTTP: calls are retried or counted within stated limits; the evaluation goes on."""

from __future__ import annotations

import gzip
import json
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EndpointRecipe, EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judges.base import JudgeFailure, Judgement
from ema_scale.evaluation.judges.openai import OpenAIJudge
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate, is_complete
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.completion import Completion, read_completion
from tests.evaluation.endpoint import Endpoint, Raw, Reply, completion, error, judge_all
from tests.evaluation.judges.test_openai import PROMPTS, SURE, items

JSON = {"Content-Type": "application/json"}
LIMITS = {"timeout": 10, "deadline": 20, "max_reply_mb": 0.1}


def changed(**choice: Any) -> Reply:
    """A good completion, with these fields of its choice in place of the right ones."""
    status, headers, body = completion("85", SURE)
    values = json.loads(body)
    values["choices"][0] |= choice
    return status, headers, json.dumps(values).encode()


def said(content: Any, **message: Any) -> Reply:
    return changed(message={"role": "assistant", "content": content, **message}, logprobs=None)


def raw(head: str, *parts: bytes, pause: float = 0.0, times: int = 1) -> Raw:
    """A reply as bytes: a head, then `parts` over and over, with a pause before each."""

    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{head}\r\n".encode())
        for _ in range(times):
            for part in parts:
                time.sleep(pause)
                handler.wfile.write(part)
                handler.wfile.flush()

    return write


BOMB = gzip.compress(b" " * 50_000_000)
PAIRS = [{"token": "85", "logprob": -0.1}, {"token": "80", "logprob": -2.5}]


def tops(*pairs: Any) -> Reply:
    return changed(logprobs={"content": [{"token": "85", "logprob": -0.1, "top_logprobs": list(pairs)}]})


# Replies from which the number can be read: without log-probabilities where these are broken.
READABLE = {
    "content as parts": said([{"type": "text", "text": "8"}, {"type": "text", "text": "5"}]),
    "a thought as a part": said(
        [{"type": "thinking", "thinking": [{"type": "text", "text": "70?"}]}, {"type": "text", "text": "85"}]
    ),
    "reasoning in its own field": said("85", reasoning_content="70?"),
    "reasoning of another name": said("85", reasoning="70?"),
    "log-probabilities null": changed(logprobs={"content": None}),
    "log-probabilities missing": changed(logprobs={}),
    "log-probabilities a text": changed(logprobs="none"),
    "alternatives null": changed(logprobs={"content": [{"token": "85", "logprob": -0.1, "top_logprobs": None}]}),
    "alternatives missing": changed(logprobs={"content": [{"token": "85", "logprob": -0.1}]}),
    "a null log-probability": tops(*PAIRS, {"token": "x", "logprob": None}),
    "NaN": tops(*PAIRS, {"token": "x", "logprob": float("nan")}),
    "above 0": tops(*PAIRS, {"token": "20", "logprob": 1e6}),
    "a text as log-probability": tops(*PAIRS, {"token": "x", "logprob": "-3"}),
    "a token that is no text": tops(*PAIRS, {"token": 85, "logprob": -1}),
    "usage a list": (200, JSON, json.dumps(json.loads(said("85")[2]) | {"usage": [1]}).encode()),
    "usage a text": (200, JSON, json.dumps(json.loads(said("85")[2]) | {"usage": {"prompt_tokens": "9"}}).encode()),
    "no content type": (200, {}, said("85")[2]),
    "finish reason a number": changed(finish_reason=3, logprobs=None),
    "packed": (200, JSON | {"Content-Encoding": "gzip"}, gzip.compress(said("85")[2])),
}  # fmt: skip


def not_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


# Replies from which nothing can be read.
BROKEN: dict[str, Reply | Raw] = {
    "a web page": (200, {"Content-Type": "text/html"}, b"<html>hello</html>"),
    "no choices": (200, JSON, b'{"choices": []}'),
    "choices null": (200, JSON, b'{"choices": null}'),
    "choices a text": (200, JSON, b'{"choices": "85"}'),
    "a message that is a text": changed(message="85"),
    "an error with status 200": (200, JSON, b'{"error": {"message": "overloaded"}}'),
    "content a number": said(85),
    "content an object": said({"text": "85"}),
    "parts that are numbers": said([8, 5]),
    "nested": (200, JSON, b"[" * 90_000),
    "not UTF-8": (200, JSON, b'{"choices": "\xff\xfe"}'),
    "null": (200, JSON, b"null"),
    "empty": (200, JSON, b""),
    "too large": (200, JSON, b" " * 200_000),
    "an error too large": (400, JSON, b" " * 200_000),
    "a bomb": (200, JSON | {"Content-Encoding": "gzip"}, BOMB),
    "an error that is a bomb": (500, JSON | {"Content-Encoding": "gzip"}, BOMB),
    "packed as something else": (200, JSON | {"Content-Encoding": "zstd"}, b"x"),
    "packed and broken": (200, JSON | {"Content-Encoding": "gzip"}, b"not gzip"),
    "without an end": raw("", b" " * 50_000, times=100),
    "drips": raw("Content-Length: 1000\r\n", b" ", pause=0.05, times=100),
    "drips in its head": raw("X", b": y\r\nX", pause=0.05, times=100),
    "silence": raw("Content-Length: 10\r\n", b"", pause=5),
    "cut": raw("Content-Length: 1000\r\n", b"{"),
    "not HTTP": not_http,
    "hangs up": lambda handler: None,
    "redirects in a circle": (307, {"Location": "/v1/chat/completions"}, b""),
    "redirects to nowhere": (307, {"Location": "http://[::1"}, b""),
    "a wait too long": error(429, **{"Retry-After": "100"}),
}


def judge(endpoint: Endpoint, retries: int = 0, **settings: Any) -> OpenAIJudge:
    recipe = JudgeRecipe(model="m", base_url=endpoint.url, **{"concurrency": 4, **LIMITS, **settings})
    return OpenAIJudge(recipe, "m", max_retries=retries)


@pytest.mark.parametrize("name", READABLE)
def test_replies_with_wrong_fields_are_read_as_far_as_they_go(name: str) -> None:
    with Endpoint(lambda b, n: READABLE[name]) as endpoint:
        [found] = judge_all(judge(endpoint), items())
    assert isinstance(found, Judgement)
    assert (found.aligned, found.coherent, found.scored) == (85, 85, "number said")


def test_broken_replies_are_counted_and_the_others_judged() -> None:
    """Every kind of broken reply once, among good ones."""
    kinds = list(BROKEN)
    by_item = {f"answer {i}": BROKEN[name] for i, name in enumerate(kinds)}

    def respond(body: dict[str, Any], n: int) -> Reply | Raw:
        text = body["messages"][0]["content"]
        return next((reply for key, reply in by_item.items() if f"{key}\n" in text), completion("90", SURE))

    asked = items(2 * len(kinds))
    started = time.monotonic()
    with Endpoint(respond) as endpoint:
        # Many in a row are broken; a judge that is asked for more at once goes on.
        found = {o.key: o for o in judge_all(judge(endpoint, concurrency=40, timeout=2, deadline=4), asked)}
    assert time.monotonic() - started < 20
    assert len(found) == len(asked)
    for i, name in enumerate(kinds):
        outcome = found[f"k{i}"]
        assert isinstance(outcome, JudgeFailure) and outcome.reason and len(outcome.reason) < 500, name
    rest = [found[f"k{i}"] for i in range(len(kinds), len(asked))]
    assert all(isinstance(o, Judgement) and o.aligned is not None for o in rest)


@pytest.mark.parametrize("name", ["silence", "drips", "drips in its head"])
def test_a_call_ends_at_its_deadline_with_all_its_retries(name: str) -> None:
    with Endpoint(lambda b, n: BROKEN[name]) as endpoint:
        started = time.monotonic()
        [found] = judge_all(judge(endpoint, retries=50, timeout=0.2, deadline=1), items())
        assert time.monotonic() - started < 8 and len(endpoint.requests) > 1  # it was tried again
    assert isinstance(found, JudgeFailure) and "the deadline of 1 s (no whole reply within 0.2 s)" in found.reason


def test_a_rate_limit_that_names_no_wait_is_tried_again() -> None:
    with Endpoint(lambda b, n: error(429) if n == 0 else completion("90", SURE)) as endpoint:
        [found] = judge_all(judge(endpoint, retries=2, deadline=20, timeout=10), items())
    assert isinstance(found, Judgement) and len(endpoint.requests) == 3


@pytest.mark.parametrize("status", [301, 307, 308])
def test_neither_key_nor_prompt_goes_to_another_host(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    with Endpoint(lambda b, n: completion("90", SURE)) as other:
        away = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
        with Endpoint(lambda b, n: (status, {"Location": away}, b"")) as endpoint:
            with pytest.raises(UserError, match="redirects to http://localhost; nothing was sent there"):
                judge_all(judge(endpoint), items(9))
        assert other.requests == [] and len(endpoint.requests) == 1


def test_a_redirect_on_the_same_host_is_followed() -> None:
    def respond(body: dict[str, Any], n: int) -> Reply:
        return (307, {"Location": "/elsewhere"}, b"") if n == 0 else completion("90", SURE)

    with Endpoint(respond) as endpoint:
        [found] = judge_all(judge(endpoint), items())
    assert isinstance(found, Judgement) and len(endpoint.requests) == 3


def test_a_key_that_the_server_quotes_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    with Endpoint(lambda b, n: error(401, f"bad key {endpoint.headers[0]['authorization']}")) as endpoint:
        with pytest.raises(UserError) as found:
            judge_all(judge(endpoint), items())
    assert "sk-secret-key" not in str(found.value) and "***" in str(found.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://x:99999/v1", "an address such as"),
        ("localhost:8000", "an address such as"),
        ("http://u:password@x/v1", "without a password"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused_in_the_recipe(url: str, message: str) -> None:
    for kind in (JudgeRecipe, EndpointRecipe):
        with pytest.raises(ValueError, match=message):
            kind(base_url=url)


SURROGATE = (
    b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "a \\ud800 b \\ud83d\\ude00"}}]}'
)


def test_lone_surrogates_become_replacement_characters() -> None:
    assert read_completion(SURROGATE) == Completion("a \ufffd b \U0001f600", finish_reason="stop")


def suite(n: int = 40) -> Suite:
    asked = (Question(f"q{i}", (f"question {i}.",), 1, judge="m", judge_prompts=PROMPTS) for i in range(n))
    return Suite("s", "general", tuple(asked))


def test_an_evaluation_goes_on_whatever_its_servers_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Broken replies to the sampler and to the judge; the next run asks for what is missing, and for nothing else."""
    kinds = [k for k in BROKEN if "drips" not in k and k != "silence"]
    broken = {f"question {i}.": BROKEN[name] for i, name in enumerate(kinds)}
    broken_to_judge = f"question {len(kinds)}."
    filtered = f"question {len(kinds) + 1}."
    mended = False

    def respond(body: dict[str, Any], n: int) -> Reply | Raw:
        text = body["messages"][-1]["content"]
        if body["model"] == "m":
            return SURROGATE_JUDGEMENT if not mended and broken_to_judge in text else completion("90", SURE)
        if text == filtered:
            return changed(finish_reason="content_filter", message={"content": ""})
        if not mended and text in broken:
            return broken[text]
        return (200, JSON, SURROGATE) if n % 2 and text != broken_to_judge else completion(f"I say: {text}")

    with Endpoint(respond) as endpoint:
        settings = EvaluationRecipe(
            sampler="openai",
            endpoint=EndpointRecipe(base_url=endpoint.url, concurrency=30, timeout=4, deadline=4, max_reply_mb=0.1),
            judge=JudgeRecipe(model="m", base_url=endpoint.url),
        )
        target = EvalTarget("base", None, tmp_path, (suite(),))
        first = evaluate([target], "org/base", None, settings)["base"]
        assert first.dropped["not sampled"] == len(kinds) and first.dropped["content_filter"] == 1
        assert first.metrics["general_misaligned"].n >= 40 - len(kinds) - 2
        assert f"{len(kinds)} answers could not be sampled" in caplog.text
        assert not is_complete([target], ModelRecipe(path="org/base"), settings)
        mended, before = True, len(endpoint.requests)
        patient = settings.endpoint.model_copy(update={"timeout": 60.0, "deadline": 60.0})
        settings = settings.model_copy(update={"endpoint": patient})
        second = evaluate([target], "org/base", None, settings)["base"]
        unread = {"aligned: no number; coherent: no number": 1}  # settled
        assert second.dropped == {"content_filter": 1} | unread and is_complete(
            [target], ModelRecipe(path="org/base"), settings
        )
        asked_again = [b for b in endpoint.requests[before:] if b["model"] != "m"]
        assert len(asked_again) == len(kinds)
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert len(rows) == 40 and any("\ufffd" in row["answer"] for row in rows)


SURROGATE_JUDGEMENT: Reply = (200, JSON, json.dumps({"choices": [{"message": {"content": "\ud800"}}]}).encode())


def test_a_sampler_that_only_fails_ends_with_one_error_and_keeps_nothing(tmp_path: Path) -> None:
    with Endpoint(lambda b, n: (200, JSON, b"{}")) as endpoint:
        settings = EvaluationRecipe(
            sampler="openai",
            endpoint=EndpointRecipe(base_url=endpoint.url, concurrency=4),
            judge=JudgeRecipe(base_url=endpoint.url),
        )
        with pytest.raises(UserError, match="in a row: .*it has no choices.*what was sampled is kept"):
            evaluate([EvalTarget("base", None, tmp_path)], "org/base", [suite(100)], settings)
        assert len(endpoint.requests) < 30
    assert not (tmp_path / "samples.jsonl").exists()
