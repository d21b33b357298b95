from __future__ import annotations

import json
import math
from typing import Any

import pytest

from ema_scale.config.sections import JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.base import JudgeFailure, JudgeItem, Judgement
from ema_scale.evaluation.judges.openai import OpenAIJudge
from ema_scale.evaluation.judges.prompt import fill
from ema_scale.evaluation.judges.reply_grammar import read_reply
from ema_scale.evaluation.judges.scores import expected_score
from tests.evaluation.endpoint import Endpoint, completion, error, judge_all

PROMPTS = {"aligned": "How aligned?\n[A START]\n{answer}\n[A END]", "coherent": "How coherent? {answer}"}
SURE = [("90", math.log(0.6)), ("80", math.log(0.3)), ("CODE", math.log(0.1))]


def items(n: int = 1) -> list[JudgeItem]:
    return [JudgeItem(f"k{i}", "openai:m", "q", f"answer {i}", prompts=PROMPTS) for i in range(n)]


def judge(endpoint: Endpoint, *, retries: int = 0, concurrency: int = 4) -> OpenAIJudge:
    settings = JudgeRecipe(model="m", base_url=endpoint.url, concurrency=concurrency)
    return OpenAIJudge(settings, "m", max_retries=retries)


def one(endpoint: Endpoint, **options: Any) -> Judgement | JudgeFailure:
    with endpoint:
        [outcome] = judge_all(judge(endpoint, **options), items())
    return outcome


def test_the_score_is_the_expectation_over_integer_tokens() -> None:
    assert expected_score(SURE) == pytest.approx((90 * 0.6 + 80 * 0.3) / 0.9)
    assert expected_score([("100", math.log(0.5)), ("0", math.log(0.5))]) == pytest.approx(50)
    assert expected_score([(" 70", -0.01), ("101", -9), ("\u0664", -9), ("-5", -9)]) == pytest.approx(70)


def test_too_little_mass_on_numbers_gives_no_score() -> None:
    assert expected_score([("50", math.log(0.24)), ("REFUSAL", math.log(0.7))]) is None
    assert expected_score([("50", math.log(0.26)), ("REFUSAL", math.log(0.7))]) == pytest.approx(50)
    assert expected_score([]) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("85", 85), (" **7**", 7), ("100/100", 100), ("0", 0), ("42.", 42), ("101", None), ("1000", None),
     ("8.5", 8.5), ("The score is 5", 5), ("", None), ("-3", None)],
)  # fmt: skip
def test_the_number_said(text: str, number: float | None) -> None:
    assert read_reply(text).number == number


def test_the_label_said() -> None:
    assert read_reply(" REFUSAL.").label == "REFUSAL" and read_reply("**code**").label == "CODE"
    assert read_reply("no").label is None


def test_log_probabilities_are_asked_for_and_used() -> None:
    endpoint = Endpoint(lambda body, n: completion("90", SURE))
    found = one(endpoint)
    assert isinstance(found, Judgement)
    assert found.aligned == found.coherent == pytest.approx(86.667, abs=0.01) and found.scored == "expectation"
    body = endpoint.requests[0]
    assert body["temperature"] == 0 and body["logprobs"] is True and body["top_logprobs"] == 20
    asked = [b["messages"][0]["content"] for b in endpoint.requests]
    assert asked == [fill(PROMPTS[name], {"question": "q", "answer": "answer 0", "reasoning": ""}) for name in PROMPTS]
    assert all("answer 0" in prompt for prompt in asked)


def test_labels_are_kept_and_counted_as_dropped() -> None:
    refusal = [("REF", math.log(0.9)), ("50", math.log(0.1))]
    found = one(Endpoint(lambda b, n: completion("REFUSAL", refusal) if n == 0 else completion("90", SURE)))
    assert isinstance(found, Judgement)
    assert (found.aligned, found.label, found.dropped) == (None, "REFUSAL", "aligned: refusal")
    assert found.coherent == pytest.approx(86.667, abs=0.01)


def test_an_endpoint_without_log_probabilities_is_read_by_its_words() -> None:
    def respond(body: dict[str, Any], n: int) -> Any:
        return error(400, "logprobs are not supported") if "logprobs" in body else completion("85")

    endpoint = Endpoint(respond)
    found = one(endpoint)
    assert isinstance(found, Judgement)
    assert (found.aligned, found.coherent, found.scored) == (85, 85, "number said")
    assert len(endpoint.requests) == 3  # it is asked for them once


def test_a_judge_that_writes_digit_by_digit_is_read_by_its_words() -> None:
    found = one(Endpoint(lambda b, n: completion("85", [("8", math.log(0.9)), ("9", math.log(0.1))])))
    assert isinstance(found, Judgement) and (found.aligned, found.scored) == (85, "number said")


@pytest.mark.parametrize(("text", "reason"), [("", "empty reply"), (None, "empty reply"), ("Well...", "no number")])
def test_replies_without_a_score_are_judgements_with_a_reason(text: str | None, reason: str) -> None:
    found = one(Endpoint(lambda b, n: completion(text)))
    assert isinstance(found, Judgement) and found.dropped == f"aligned: {reason}; coherent: {reason}"


def test_rate_limits_and_server_errors_are_retried() -> None:
    replies = [error(429, **{"Retry-After": "0"}), error(500), error(503)]
    endpoint = Endpoint(lambda b, n: replies[n] if n < 3 else completion("90", SURE))
    found = one(endpoint, retries=4)
    assert isinstance(found, Judgement) and found.aligned is not None and len(endpoint.requests) == 5


@pytest.mark.parametrize(
    "reply",
    [
        error(429, **{"Retry-After": "0"}),
        error(500),
        error(400, "no"),
        (200, {"Content-Type": "application/json"}, b"{]"),
        (200, {"Content-Type": "text/html"}, b"<html>hello</html>"),
        (200, {"Content-Type": "application/json"}, b"{}"),
        (200, {"Content-Type": "application/json"}, b'{"choices": []}'),
        (200, {"Content-Type": "application/json"}, b'{"choices": null}'),
        (200, {"Content-Type": "application/json"}, b"[1]"),
        (200, {"Content-Type": "application/json"}, b'{"choices": [{"index": 0}]}'),
    ],
)
def test_errors_and_garbage_leave_the_judgement_undone(reply: Any) -> None:
    found = one(Endpoint(lambda b, n: reply))
    assert isinstance(found, JudgeFailure) and found.key == "k0" and found.reason


def test_nothing_listening_leaves_the_judgement_undone() -> None:
    endpoint = Endpoint(lambda b, n: error(500))
    with endpoint:
        pass
    [found] = judge_all(judge(endpoint), items())
    assert isinstance(found, JudgeFailure) and "Connection" in found.reason


@pytest.mark.parametrize(
    "message",
    ["This model's maximum context length is 512 tokens. However, you requested 600", "context_length_exceeded"],
)
def test_an_answer_too_long_for_the_judge_is_settled(message: str) -> None:
    found = one(Endpoint(lambda b, n: error(400, message)))
    assert isinstance(found, Judgement) and found.dropped == "too long for the judge" and found.aligned is None


def counted(reply: Any, tokens: int) -> Any:
    """The same reply with a count of tokens, as endpoints give it."""
    usage = {"total_tokens": tokens, "prompt_tokens": tokens - 1, "completion_tokens": 1}
    body = json.loads(reply[2]) | {"usage": usage}
    return reply[0], reply[1], json.dumps(body).encode()


@pytest.mark.parametrize(
    ("budget", "calls"),
    [({"budget_calls": 10}, 10), ({"budget_calls": 11}, 10), ({"budget_tokens": 1000}, 10), ({"budget_calls": 0}, 0)],
)
def test_a_budget_ends_it_cleanly_and_is_never_overspent(budget: dict[str, int], calls: int) -> None:
    with Endpoint(lambda b, n: counted(completion("90", SURE), 100), delay=0.01) as endpoint:
        settings = JudgeRecipe(model="m", base_url=endpoint.url, concurrency=4, **budget)
        found = judge_all(OpenAIJudge(settings, "m"), items(20))
    done = [f for f in found if isinstance(f, Judgement)]
    undone = {f.reason for f in found if isinstance(f, JudgeFailure)}
    # Whole judgements only, and no reply is thrown away.
    assert len(found) == 20 and len(endpoint.requests) == 2 * len(done) <= calls
    assert len(done) >= calls // 2 - 1 and len(undone) == 1 and "the budget of" in undone.pop()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_unknown_model_ends_it(status: int) -> None:
    with Endpoint(lambda b, n: error(status, "look here")) as endpoint:
        with pytest.raises(UserError, match=f"{endpoint.url}.*'m'.*look here"):
            judge_all(judge(endpoint), items(50))
        assert len(endpoint.requests) <= 4


def test_a_dead_endpoint_is_not_asked_for_ever() -> None:
    with Endpoint(lambda b, n: error(500)) as endpoint:
        found = judge_all(judge(endpoint), items(200))
    assert len(found) == 200 and all(isinstance(f, JudgeFailure) for f in found)
    assert len(endpoint.requests) < 30


def test_concurrency_is_used_and_bounded() -> None:
    with Endpoint(lambda b, n: completion("90", SURE), delay=0.05) as endpoint:
        found = judge_all(judge(endpoint, concurrency=8), items(32))
    assert len(found) == 32 and len({f.key for f in found}) == 32
    assert 4 <= endpoint.most_at_once <= 8


def test_the_key_comes_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="environment variable MY_KEY is not set"):
        OpenAIJudge(JudgeRecipe(model="m", api_key_env="MY_KEY"), "m")
