"""What a judge's endpoint refuses for ever: another way of asking, a settled answer, or an error in the end."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EndpointRecipe, EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judges.base import JudgeFailure, Judgement
from ema_scale.evaluation.judging.rejudge import rejudge
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate, is_complete
from ema_scale.evaluation.suites import Suite
from tests.evaluation.endpoint import Endpoint, Reply, completion, judge_all
from tests.evaluation.judges.test_openai import SURE, items, judge, one
from tests.evaluation.test_run import exact_suite, open_suite

# As these endpoints word them.
NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
NO_TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
)
NO_LOGPROBS = "You are not allowed to request logprobs from this model"
AZURE = "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."


def refused(message: str, status: int = 400, **fields: Any) -> Reply:
    body = {"error": {"message": message, "type": "invalid_request_error", **fields}}
    return status, {"Content-Type": "application/json"}, json.dumps(body).encode()


def ended(reason: str, text: str | None = None) -> Reply:
    """A completion that the endpoint ended for this reason."""
    status, headers, body = completion(text)
    values = json.loads(body)
    values["choices"][0]["finish_reason"] = reason
    return status, headers, json.dumps(values).encode()


def thinker(body: dict[str, Any], n: int) -> Reply:
    """A model that thinks first, as OpenAI serves it: it refuses one thing at a time."""
    if "max_tokens" in body:
        return refused(NO_MAX_TOKENS, param="max_tokens", code="unsupported_parameter")
    if "temperature" in body:
        return refused(NO_TEMPERATURE, param="temperature", code="unsupported_value")
    if "logprobs" in body:
        return refused(NO_LOGPROBS, 403)
    return completion("85") if body["max_completion_tokens"] > 1000 else ended("length")


def test_a_model_that_thinks_first_is_asked_as_it_wants(caplog: pytest.LogCaptureFixture) -> None:
    with Endpoint(thinker, delay=0.01) as endpoint, caplog.at_level(logging.WARNING):
        found = judge_all(judge(endpoint, concurrency=4), items(12))
    assert all(isinstance(f, Judgement) and (f.aligned, f.scored) == (85, "number said") for f in found)
    # Each refusal is learnt once; four judgements were under way meanwhile.
    assert len(found) == 12 and 24 + 3 <= len(endpoint.requests) <= 24 + 4 * 3
    said = [record.getMessage() for record in caplog.records]
    assert sum("max_completion_tokens" in line for line in said) == 1 and sum("temperature" in s for s in said) == 1


def test_temperature_is_dropped_only_where_it_is_refused() -> None:
    found = one(Endpoint(lambda b, n: refused("the temperature of our machines is too high")))
    assert isinstance(found, JudgeFailure) and "machines" in found.reason
    endpoint = Endpoint(lambda b, n: refused(NO_MAX_TOKENS) if "max_tokens" in b else completion("90", SURE))
    found = one(endpoint)
    assert isinstance(found, Judgement) and found.scored == "expectation" and endpoint.requests[-1]["temperature"] == 0


def test_thinking_without_an_end_is_no_verdict() -> None:
    found = one(Endpoint(lambda b, n: refused(NO_MAX_TOKENS) if "max_tokens" in b else ended("length")))
    assert isinstance(found, JudgeFailure) and "thought for 4096 tokens" in found.reason


@pytest.mark.parametrize(
    "reply",
    [
        refused(AZURE, code="content_filter", param="prompt"),
        refused("litellm.ContentPolicyViolationError: no"),
        refused("Invalid prompt: it was flagged as potentially violating our usage policy.", code="invalid_prompt"),
        refused("Your chosen model requires moderation and your input was flagged", 403),
        ended("content_filter"),
        ended("content_filter", ""),
    ],
)
def test_an_answer_that_the_judges_filter_keeps_back_is_settled(reply: Reply) -> None:
    found = one(Endpoint(lambda b, n: reply))
    assert isinstance(found, Judgement) and found.dropped == "content_filter" and found.aligned is None


def asked(folder: Path, judging: Callable[[dict[str, Any], int], Reply], *suites: Suite, **settings: Any) -> Any:
    """(outcome of `evaluate`, judge's calls, whether anything is left to do); policy and judge over HTTP."""
    number = itertools.count()

    def respond(body: dict[str, Any], n: int) -> Reply:
        return completion(f"answer no. {next(number)}.") if body["model"] == "org/base" else judging(body, n)

    with Endpoint(respond) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", endpoint.url)  # another port each time, and the same server
        recipe = EvaluationRecipe(
            sampler="openai", endpoint=EndpointRecipe(), judge=JudgeRecipe(model="m", concurrency=4, **settings)
        )
        target = EvalTarget("base", None, folder / "eval", suites or (open_suite(), exact_suite()))
        found: Any = None
        try:
            found = evaluate([target], "org/base", [open_suite()], recipe)["base"]
        except UserError as error:
            found = error
        calls = sum(body["model"] == "m" for body in endpoint.requests)
        return found, calls, not is_complete([target], ModelRecipe(path="org/base"), recipe)


def test_filtered_answers_are_counted_apart_and_never_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def some(body: dict[str, Any], n: int) -> Reply:
        bad = "no. 3." in str(body) or "no. 5." in str(body)
        return refused(AZURE, code="content_filter") if bad else completion("90", SURE)

    found, calls, left = asked(tmp_path, some, open_suite())
    assert found.dropped == {"content_filter": 2} and calls == 2 * 10 + 2 and not left
    rate = found.metrics["general_misaligned"]
    assert (rate.n, rate.dropped) == (10, 2) and "kept back 2 of 12 answers" in caplog.text
    again, calls, _ = asked(tmp_path, some, open_suite())
    assert calls == 0 and again.dropped == found.dropped


@pytest.mark.parametrize("reply", [refused("no such luck"), refused("no", 422), (200, {}, b"<html>")])
def test_a_judge_that_said_nothing_is_an_error_when_all_is_written(tmp_path: Path, reply: Reply) -> None:
    """Though the sums are judged exactly; the same command makes it good."""
    found, _, left = asked(tmp_path, lambda b, n: reply)
    assert isinstance(found, UserError) and "no answer of base could be judged" in str(found) and left
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["dropped"] == {"not judged": 12} and summary["metrics"]["benign_learned"]["n"] == 12
    assert len(read_jsonl(tmp_path / "eval" / "samples.jsonl")) == 24
    with Endpoint(lambda b, n: reply) as endpoint, pytest.raises(UserError, match="no answer of .*eval could be"):
        rejudge(tmp_path / "eval", [f"evaluation.judge.base_url={endpoint.url}"])
    found, calls, left = asked(tmp_path, lambda b, n: completion("90", SURE))
    assert found.dropped == {} and calls == 24 and not left


def test_a_budget_that_is_spent_is_no_error(tmp_path: Path) -> None:
    found, calls, left = asked(tmp_path, lambda b, n: completion("90", SURE), open_suite(), budget_calls=0)
    assert found.dropped == {"not judged": 12} and calls == 0 and left
