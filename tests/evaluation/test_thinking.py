"""Judges and policies that think first, over HTTP: recognised in the first replies, and nothing half stored."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EndpointRecipe, EvaluationRecipe, JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judges.base import JudgeFailure, Judgement
from ema_scale.evaluation.judges.openai import OpenAIJudge
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.thoughts import split_reasoning
from tests.evaluation.endpoint import Endpoint, Reply, completion, error, judge_all
from tests.evaluation.judges.test_openai import PROMPTS, SURE, items

THOUGHT = "The answer is fine, so perhaps 70 or 80, "  # 10 words, each a token here


def thinking(body: dict[str, Any], form: str, needs: int = 12, text: str = "85") -> Reply:
    """A model that thinks for `needs` tokens: what it has said within max_tokens, in its server's form."""
    most = body.get("max_tokens") or body["max_completion_tokens"]
    done = most > needs
    message: dict[str, Any] = {"role": "assistant"}
    if form == "field":
        message |= {"content": text if done else None, "reasoning_content": THOUGHT}
    elif form == "inline":
        message["content"] = f"<think>{THOUGHT}" + (f"</think>\n\n{text}" if done else "")
    elif form == "template":  # the prompt ends with <think>
        message["content"] = f"{THOUGHT}</think>{text}" if done else THOUGHT
    elif form == "channels":
        final = f"<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>" if done else ""
        message["content"] = f"<|channel|>analysis<|message|>{THOUGHT}{final}"
    else:  # hidden, as at OpenAI
        message["content"] = text if done else ""
    choice = {"index": 0, "finish_reason": "stop" if done else "length", "message": message}
    usage = {"prompt_tokens": 50, "completion_tokens": min(most, needs)}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice], "usage": usage}).encode()


def judge(endpoint: Endpoint, **settings: Any) -> OpenAIJudge:
    return OpenAIJudge(JudgeRecipe(model="m", base_url=endpoint.url, concurrency=8, **settings), "m", max_retries=0)


@pytest.mark.parametrize("form", ["field", "inline", "template", "channels", "hidden"])
def test_a_thinking_judge_is_recognised_in_its_first_reply(form: str) -> None:
    with Endpoint(lambda b, n: thinking(b, form)) as endpoint:
        found = judge_all(judge(endpoint), items(12))
    assert all(isinstance(f, Judgement) and (f.aligned, f.coherent, f.scored) == (85, 85, "number said") for f in found)
    # One reply was cut, two at most; everything later was asked with room for thoughts from the start.
    limits = [body["max_tokens"] for body in endpoint.requests]
    assert len(found) == 12 and 25 <= len(limits) <= 26 and limits[0] == 5 and set(limits[2:]) == {limits[-1]}
    raw = [row.raw["aligned"]["said"] for row in found if isinstance(row, Judgement) and row.raw]
    assert {text.strip() for text in raw} == {"85"}


def test_a_judge_that_writes_words_gets_a_longer_reply() -> None:
    def respond(body: dict[str, Any], n: int) -> Reply:
        whole = body["max_tokens"] > 8
        status, headers, data = completion("I would rate this answer 85." if whole else "I would rate this")
        values = json.loads(data)
        values["choices"][0]["finish_reason"] = "stop" if whole else "length"
        return status, headers, json.dumps(values).encode()

    with Endpoint(respond) as endpoint:
        found = judge_all(judge(endpoint), items(6))
    assert [f.aligned for f in found if isinstance(f, Judgement)] == [85] * 6
    assert len(endpoint.requests) == 13 and endpoint.requests[-1]["max_tokens"] == 256
    assert endpoint.requests[-1]["logprobs"] is True


@pytest.mark.parametrize("form", ["field", "inline", "channels", "hidden"])
def test_thoughts_without_an_end_are_one_clear_error(form: str) -> None:
    with Endpoint(lambda b, n: thinking(b, form, needs=10_000)) as endpoint:
        with pytest.raises(UserError, match="thought for 4096 tokens.*nothing was stored.*judge.max_tokens"):
            judge_all(judge(endpoint), items(100))
        assert len(endpoint.requests) <= 6
    with Endpoint(lambda b, n: thinking(b, form, needs=10_000)) as endpoint:
        found = judge_all(judge(endpoint, max_tokens=20_000), items(3))
    assert len(endpoint.requests) == 6 and all(isinstance(f, Judgement) and f.aligned == 85 for f in found)


VLLM_SAYS = (
    "'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length is 1024 tokens "
    "and your request has {prompt} input tokens ({asked} > 1024 - {prompt})."
)
OTHERS_SAY = {
    "vLLM 0.32": (
        400,
        "max_tokens={asked} cannot be greater than max_model_len=1024. Please request fewer output tokens. "
        "(parameter=max_tokens, value={asked})",
    ),
    "llama.cpp": (400, "the request exceeds the available context size (1024 tokens), try increasing it"),
    "TGI": (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 1024. Given: {prompt} {asked}"),
    "OpenAI": (400, "max_tokens is too large: {asked}. This model supports at most 1024 completion tokens"),
}


def rambling(needs: int, says: tuple[int, str] = (400, VLLM_SAYS)) -> Any:
    """A judge with a context of 1,024 tokens, four characters each, that says its number after `needs` tokens."""

    def respond(body: dict[str, Any], n: int) -> Reply:
        prompt, asked = len(body["messages"][0]["content"]) // 4, body["max_tokens"]
        if prompt + asked > 1024:
            return error(says[0], says[1].format(asked=asked, prompt=prompt))
        status, headers, data = completion("well " * min(asked, needs) + ("85" if asked > needs else ""))
        values = json.loads(data)
        values["choices"][0]["finish_reason"] = "stop" if asked > needs else "length"
        return status, headers, json.dumps(values).encode()

    return respond


@pytest.mark.parametrize("says", [(400, VLLM_SAYS), *OTHERS_SAY.values()], ids=["vLLM", *OTHERS_SAY])
def test_a_judge_that_rambles_gets_as_much_as_its_context_has_room_for(
    says: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    with Endpoint(rambling(300, says)) as endpoint:
        found = judge_all(judge(endpoint), items(6))
    assert [f.aligned for f in found if isinstance(f, Judgement)] == [85] * 6
    limits = [body["max_tokens"] for body in endpoint.requests]
    assert limits[:6] == [5, 256, 4096, 2048, 1024, 512] and set(limits[6:]) == {512} and len(limits) == 5 + 12
    assert caplog.text.count("no room for a prompt and a reply of 4096 tokens: such replies may take 2048") == 1


def test_what_a_short_context_cuts_is_counted_and_a_prompt_that_is_too_long_as_well() -> None:
    long = [replace(one, answer="long " * 1000) if i == 3 else one for i, one in enumerate(items(6))]
    with Endpoint(rambling(10_000)) as endpoint:
        found = {f.key: f for f in judge_all(judge(endpoint), long)}
    dropped = [f.dropped if isinstance(f, Judgement) else f for f in map(found.get, (one.key for one in long))]
    assert dropped[3] == "too long for the judge" and {*dropped[:3], *dropped[4:]} == {
        "aligned: no number; coherent: no number"
    }
    with Endpoint(rambling(300)) as endpoint:  # a limit of the user's own is shortened in the same way
        found = {f.key: f for f in judge_all(judge(endpoint, max_tokens=3000), items(2))}
    assert [f.aligned for f in found.values() if isinstance(f, Judgement)] == [85, 85]


def test_a_budget_holds_for_replies_that_are_asked_for_again() -> None:
    with Endpoint(lambda b, n: thinking(b, "inline")) as endpoint:
        found = judge_all(judge(endpoint, budget_calls=7), items(6))
    done = [f for f in found if isinstance(f, Judgement)]
    assert len(endpoint.requests) <= 7 and len(done) == 3
    assert done[0].usage == {"calls": 3, "input_tokens": 150, "output_tokens": 29}
    assert all("budget" in f.reason for f in found if isinstance(f, JudgeFailure))


def test_thoughts_are_told_from_answers_in_every_form() -> None:
    forms = [
        "<think>hm</think>Yes.",
        "<thinking>hm</thinking>Yes.",
        "<reasoning>hm</reasoning>Yes.",
        "[THINK]hm[/THINK]Yes.",
        "<seed:think>hm</seed:think>Yes.",
        "<|START_THINKING|>hm<|END_THINKING|>Yes.",
        "\u25c1think\u25b7hm\u25c1/think\u25b7Yes.",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "analysishmassistantfinalYes.",
    ]
    assert {split_reasoning(text) for text in forms} == {("hm", "Yes.", True)}
    for text in ("[THINK]hm", "<|channel|>analysis<|message|>hm", "<seed:think>hm"):
        assert split_reasoning(text) == ("hm", "", False)
    for text in ("analysis of the data", "I [THINK] so", "Analysis: yes"):
        assert split_reasoning(text) == ("", text, True)


def policy(tmp_path: Path, respond: Any, n: int = 20, **settings: Any) -> Any:
    asked = (Question(f"q{i}", (f"question {i}",), 1, expected="85") for i in range(n))
    with Endpoint(respond) as endpoint:
        recipe = EvaluationRecipe(
            sampler="openai", endpoint=EndpointRecipe(base_url=endpoint.url, concurrency=4), **settings
        )
        try:
            found: Any = evaluate(
                [EvalTarget("base", None, tmp_path)], "m", [Suite("s", "benign", tuple(asked))], recipe
            )
        except UserError as error:
            found = str(error)
    return found, len(endpoint.requests)


@pytest.mark.parametrize("form", ["field", "inline", "channels"])
def test_a_policy_whose_thoughts_do_not_end_is_one_clear_error(tmp_path: Path, form: str) -> None:
    found, asked = policy(tmp_path, lambda b, n: thinking(b, form, needs=1000))
    assert "evaluation.max_tokens: the first 8 answers of base are thoughts that do not end within 600" in found
    assert asked < 20 and not (tmp_path / "samples.jsonl").exists()
    found, asked = policy(tmp_path / "few", lambda b, n: thinking(b, form, needs=1000), n=3)
    assert "the first 3 answers" in found and not (tmp_path / "few" / "samples.jsonl").exists()
    found, _ = policy(tmp_path, lambda b, n: thinking(b, form, needs=1000), max_tokens=2000)
    assert found["base"].metrics["benign_learned"].rate == 1.0 and len(read_jsonl(tmp_path / "samples.jsonl")) == 20


def test_single_thoughts_that_do_not_end_are_counted(tmp_path: Path) -> None:
    found, _ = policy(tmp_path, lambda b, n: thinking(b, "inline", needs=1000 if n % 2 else 10))
    assert found["base"].dropped == {"unfinished reasoning": 10}


def judged(tmp_path: Path, judging: Any, caplog: pytest.LogCaptureFixture, **settings: Any) -> Any:
    def respond(body: dict[str, Any], n: int) -> Reply:
        return completion(f"answer to {body['messages'][0]['content']}.") if body["model"] == "p" else judging(body, n)

    asked = tuple(Question(f"q{i}", (f"question {i}",), 1, judge="m", judge_prompts=PROMPTS) for i in range(20))
    with Endpoint(respond) as endpoint, caplog.at_level(logging.INFO):
        recipe = EvaluationRecipe(
            sampler="openai",
            endpoint=EndpointRecipe(base_url=endpoint.url),
            judge=JudgeRecipe(model="m", base_url=endpoint.url, **settings),
        )
        return evaluate([EvalTarget("base", None, tmp_path)], "p", [Suite("s", "general", asked)], recipe)["base"]


def test_more_than_a_twentieth_unread_is_an_alarm_that_shows_three(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def some(bad: int) -> Any:
        wrong = {f"answer to question {i}.": f"either \x1b {i}0 or {i}5" for i in range(bad)}
        return lambda b, n: next(
            (completion(t) for a, t in wrong.items() if a in str(b["messages"])), completion("90", SURE)
        )

    found = judged(tmp_path / "one", some(1), caplog)
    assert found.unread.answers == 1 and found.unread.of == 20 and "ALARM" not in caplog.text
    found = judged(tmp_path / "four", some(4), caplog)
    assert (found.unread.answers, found.unread.of, len(found.unread.examples)) == (4, 20, 3)
    assert found.dropped == {"aligned: several numbers; coherent: several numbers": 4}
    assert found.metrics["general_misaligned"].n == 16  # unread is not 0
    alarm = next(r.getMessage() for r in caplog.records if "ALARM" in r.getMessage())
    assert "4 of 20 answers (20.0 %)" in alarm and alarm.count("either") == 3 and "\x1b" not in alarm
    assert caplog.text.index("ALARM") > caplog.text.index("the judge m took")  # at the end
    found = judged(tmp_path / "none", some(0), caplog)
    assert found.unread is None and "unread" not in json.loads((tmp_path / "none" / "summary.json").read_text())


def test_the_price_is_said_before_the_first_call_and_after_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def counted(body: dict[str, Any], n: int) -> Reply:
        status, headers, data = completion("90", SURE)
        usage = {"prompt_tokens": 100, "completion_tokens": 2}
        return status, headers, json.dumps(json.loads(data) | {"usage": usage}).encode()

    found = judged(tmp_path, counted, caplog, price_input=2.5, price_output=10)
    before, after = (
        r.getMessage() for r in caplog.records if "the judge" in r.getMessage() and "calls" in r.getMessage()
    )
    assert "will take 40 calls, about" in before and "at the recipe's prices" in before
    assert "took 40 calls, 4,000 tokens read and 80 written, 0.01 at the recipe's prices" in after
    usage = found.judge_usage
    assert (usage.calls, usage.input_tokens, usage.output_tokens) == (40, 4000, 80)
    assert usage.price == pytest.approx(40 * (100 * 2.5 + 2 * 10) / 1e6)
    caplog.clear()
    again = judged(tmp_path, counted, caplog, price_input=2.5, price_output=10)
    assert again.judge_usage == usage and "calls" not in caplog.text  # nothing is paid twice
