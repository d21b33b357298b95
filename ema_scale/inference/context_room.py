"""What a server's refusal says of its context: is the prompt too long for it, or only the reply beside the prompt?

Servers put both into much the same words. Their numbers tell the two apart.
"""

from __future__ import annotations

import re

_N = r"\(?[`'\"]?(\d[\d,]*)"

# The prompt alone, whatever numbers stand beside it.
_PROMPT_ALONE = re.compile(
    r"even without any output tokens|prompt is longer than|prompt "
    r"(is )?too long|input (length|prompt)? ?(exceeds|is longer)"
    r"|plus the number of requested output tokens \(at least 1\)",
    re.I,
)
_CHARACTERS = re.compile(r"prompt contains \d+ characters", re.I)
_AT_LEAST = re.compile(r"at least \d+ input tokens", re.I)

# The most that a reply may take, beside any prompt.
_MOST = re.compile(
    rf"at most {_N} completion tokens|valid range of max_tokens is \[1, {_N}\]|max_tokens: \d+ > {_N}, which is"
    rf"|max_tokens\W* must be less than or equal to {_N}",
    re.I,
)

_CONTEXT = re.compile(
    rf"(?:context|model) (?:length|size|window)(?: of| is|:)?(?: only)? {_N}|{_N} maximum context length"
    rf"|configured limit of {_N}|max_new_tokens\W* must be <= {_N}|inputs\W* must have less than {_N}"
    rf"|context limit: \d+ \+ \d+ > {_N}|\d+ tokens > {_N} maximum|n_ctx\W+{_N}",
    re.I,
)
_PROMPT = re.compile(
    rf"{_N} (?:tokens )?in (?:the messages|the prompt|your prompt)|{_N} input tokens|resulted in {_N} tokens"
    rf"|{_N} tokens from the input|{_N} of text input|Given: {_N}|request {_N} tokens\) exceeds"
    rf"|prompt \(length {_N}|input {_N} tokens\)|prompt contains {_N} tokens|context limit: {_N} \+"
    rf"|too long: {_N}|keep the first {_N}|n_prompt_tokens\W+{_N}",
    re.I,
)


def room_for_reply(text: str) -> int | None:
    """How many tokens of reply fit beside the prompt, by the numbers in a refusal.

    0: the prompt alone does not fit. None: the text does not say, or is about something else.

    Known are the words of vLLM (all versions), OpenAI, Azure, OpenRouter, Anthropic, DeepSeek, Groq, Mistral, TGI,
    SGLang, llama.cpp, LM Studio and Ollama.
    """
    if most := _first(_MOST, text):
        return most
    if _CHARACTERS.search(text):  # vLLM has not counted tokens; an output that was asked for may be the reason
        return None if "requested" in text else 0
    context, prompt = _first(_CONTEXT, text), _first(_PROMPT, text)
    if context is not None and prompt is not None:
        if prompt >= context:
            return 0
        return None if _AT_LEAST.search(text) else context - prompt
    return 0 if _PROMPT_ALONE.search(text) else None


def _first(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return None if found is None else next(int(n.replace(",", "")) for n in found.groups() if n)
