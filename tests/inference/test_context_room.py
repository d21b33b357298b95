"""A prompt that is too long for a server is told from a reply that is, by the numbers in the server's words."""

from __future__ import annotations

from typing import Any

import pytest

from ema_scale.config.endpoints import EndpointRecipe
from ema_scale.config.sections import ModelRecipe
from ema_scale.inference.base import PROMPT_TOO_LONG, SampleRequest, SamplerOptions
from ema_scale.inference.context_room import room_for_reply
from ema_scale.inference.make import make_sampler
from tests.evaluation.endpoint import Endpoint, Reply, completion, error

# Words of servers with a context of 1,000 tokens -> the room beside the prompt, or None if they do not say.
# {p}: tokens of the prompt, {a}: of the reply that was asked for.
TOGETHER = {
    "OpenAI": "This model's maximum context length is 1000 tokens. "
    "However, you requested {t} tokens ({p} in the messages, "
    "{a} in the completion). Please reduce the length of the messages or completion.",
    "OpenAI completions": "This model's maximum context length is 1000 tokens, however "
    "you requested {t} tokens ({p} in your "
    "prompt; {a} for the completion).",
    "OpenRouter": "This endpoint's maximum context length is 1000 tokens. "
    "However, you requested about {t} tokens ({p} of text "
    "input, {a} in the output).",
    "vLLM 0.8": "'max_tokens' or 'max_completion_tokens' is too large: {a}. "
    "This model's maximum context length is 1000 tokens "
    "and your request has {p} input tokens ({a} > 1000 - {p}).",
    "SGLang": "Requested token count exceeds the model's maximum context "
    "length of 1000 tokens. You requested a total of {t} "
    "tokens: {p} tokens from the input messages and {a} tokens for the completion.",
    "TGI": "Input validation error: `inputs` tokens + `max_new_tokens` "
    "must be <= 1000. Given: {p} `inputs` tokens and {a} "
    "`max_new_tokens`",
    "Anthropic": "input length and `max_tokens` exceed context limit: {p} + "
    "{a} > 1000, decrease input length or `max_tokens`",
}
UNSAID = {
    "vLLM 0.14": "This model's maximum context length is 1000 tokens. "
    "However, you requested {a} output tokens and your prompt "
    "contains at least {l} input tokens, for a total of at least 1001 tokens.",
    "llama.cpp": "the request exceeds the available context size, try increasing it",
    "Groq": "Please reduce the length of the messages or completion: context_length_exceeded",
}
PROMPT_ALONE = {
    "OpenAI": "This model's maximum context length is 1000 tokens. However, your messages resulted in {p} tokens.",
    "OpenAI's newer": "Input tokens exceed the configured limit of 1000 tokens. Your messages resulted in {p} tokens.",
    "vLLM 0.32": "This model's maximum context length is 1000 tokens. "
    "However, your prompt contains at least {p} input tokens, "
    "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt.",
    "vLLM 0.32, characters": "This model's maximum context length is 1000 tokens. "
    "However, your prompt contains 90000 characters "
    "(more than 16000 characters, which is the upper bound for 999 input tokens).",
    "vLLM 0.32, engine": "The decoder prompt (length {p}) is longer than the maximum "
    "model length of 1000. Make sure that ...",
    "SGLang": "The input ({p} tokens) is longer than the model's context length (1000 tokens).",
    "TGI": "Input validation error: `inputs` must have less than 1000 tokens. Given: {p}",
    "llama.cpp": "the request exceeds the available context size, type: "
    "exceed_context_size_error, 'n_prompt_tokens': {p}, "
    "'n_ctx': 1000",
    "llama.cpp, newer": "request ({p} tokens) exceeds the available context size (1000 tokens), try increasing it",
    "LM Studio": "Trying to keep the first {p} tokens when context the "
    "overflows. However, the model is loaded with context "
    "length of only 1000 tokens, which is not enough.",
    "Ollama": "prompt too long; exceeded max context length by 200 tokens",
    "Mistral": "Prompt contains {p} tokens and 0 draft tokens, too large for model with 1000 maximum context length",
    "Anthropic": "prompt is too long: {p} tokens > 1000 maximum",
    "Fireworks": "The prompt is too long: {p}, model maximum context length: 1000",
}
MOST = {
    "OpenAI": "max_tokens is too large: {a}. This model supports at most "
    "700 completion tokens, whereas you provided {a}.",
    "DeepSeek": "Invalid max_tokens value, the valid range of max_tokens is [1, 700]",
    "Groq": "`max_tokens` must be less than or equal to `700`, the "
    "maximum value for `max_tokens` is less than the context",
    "Anthropic": "max_tokens: {a} > 700, which is the maximum allowed number of output tokens for this model",
}


def say(text: str, prompt: int, asked: int) -> str:
    values = {"{p}": prompt, "{a}": asked, "{t}": prompt + asked, "{l}": 1001 - asked}
    for mark, number in values.items():
        text = text.replace(mark, str(number))
    return text


@pytest.mark.parametrize(
    ("texts", "prompt", "room"),
    [(TOGETHER, 400, 600), (UNSAID, 400, None), (PROMPT_ALONE, 1200, 0), (MOST, 400, 700)],
    ids=["together", "unsaid", "prompt", "most"],
)
def test_the_numbers_say_which_of_the_two_is_too_long(texts: dict[str, str], prompt: int, room: int | None) -> None:
    assert {server: room_for_reply(say(text, prompt, 900)) for server, text in texts.items()} == dict.fromkeys(
        texts, room
    )


@pytest.mark.parametrize(
    "text", ["temperature must be <= 2. Given: 3", "no such model", "logprobs is not supported", ""]
)
def test_other_refusals_say_nothing_of_room(text: str) -> None:
    assert room_for_reply(text) is None


def sampled(respond: Any, *requests: SampleRequest) -> tuple[dict[str, Any], list[int]]:
    with Endpoint(respond) as endpoint:
        options = SamplerOptions(ModelRecipe(path="org/base"), (), endpoint=EndpointRecipe(base_url=endpoint.url))
        found = {result.key: result for result in make_sampler("openai", options).sample(requests)}
        return found, [body["max_tokens"] for body in endpoint.requests]


def asking(key: str, prompt: str, **settings: Any) -> SampleRequest:
    return SampleRequest(key, ({"role": "user", "content": prompt},), None, max_tokens=900, **settings)


@pytest.mark.parametrize(
    ("together", "alone", "limits"),
    [(TOGETHER[one], PROMPT_ALONE["OpenAI"], [900, 600]) for one in TOGETHER]
    + [(UNSAID[one], PROMPT_ALONE["vLLM 0.32"], [900, 450]) for one in UNSAID]
    + [(UNSAID["vLLM 0.14"], alone, [900, 450]) for alone in PROMPT_ALONE.values()],
)
def test_a_reply_that_does_not_fit_is_shortened_and_a_prompt_that_does_not_is_counted(
    together: str, alone: str, limits: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def respond(body: dict[str, Any], n: int) -> Reply:
        prompt, asked = len(body["messages"][0]["content"]), body["max_tokens"]
        if prompt + asked <= 1000:
            return completion("yes")
        return error(400, say(alone if prompt >= 1000 else together, prompt, asked))

    found, asked = sampled(respond, asking("fits", "x" * 400), asking("not", "x" * 1200), asking("short", "x"))
    assert found["fits"].texts == ("yes",) and found["short"].texts == ("yes",)
    assert found["not"].finish_reasons == (PROMPT_TOO_LONG,)
    assert sorted(asked, reverse=True) == sorted([*limits, 900, 900], reverse=True)
    assert (
        "no room in its context for 1 prompts and replies of the length asked for: their answers were cut"
        in caplog.text
    )
    assert f"the shortest after {limits[-1]} tokens" in caplog.text


def test_where_nothing_fits_and_no_number_is_said_the_prompt_counts_as_too_long() -> None:
    found, asked = sampled(lambda b, n: error(400, UNSAID["llama.cpp"]), asking("a", "x"))
    assert found["a"].finish_reasons == (PROMPT_TOO_LONG,) and asked == [900, 450, 225, 112, 56, 28]
