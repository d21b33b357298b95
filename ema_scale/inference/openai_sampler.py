"""Sampling from an OpenAI-compatible server that is running already, such as `vllm serve` on several nodes.

The server holds the base model and its LoRA adapters under names. There is one request per answer, each with its own
seed. Reasoning that the server splits off is put back before the answer, as a model writes it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ema_scale.core.errors import UserError
from ema_scale.inference.base import (
    NEUTRAL_SAMPLING,
    NOT_SAMPLED,
    PROMPT_TOO_LONG,
    SampleRequest,
    SampleResult,
    SamplerOptions,
    ScoreRequest,
    ScoreResult,
    too_long,
)
from ema_scale.inference.chat_client import CallError, CallLimits, ChatClient
from ema_scale.inference.completion import CONTENT_FILTER, Completion
from ema_scale.inference.openai_pool import Job, OpenAIPool
from ema_scale.inference.served import check_served
from ema_scale.inference.usage import CHARACTERS_PER_TOKEN, Usage, describe

log = logging.getLogger(__name__)

# The least room for a reply that is looked for where the server does not say how much there is.
_LEAST_TOKENS = 16
# What OpenAI's own API takes of NEUTRAL_SAMPLING; it has no other such settings, and refuses the names.
_OPENAI_TAKES = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class _Answer:
    """One answer. finish_reason: also PROMPT_TOO_LONG, CONTENT_FILTER and NOT_SAMPLED."""

    request: SampleRequest
    index: int
    finish_reason: str
    text: str = ""
    tokens: int = 0


def _result(request: SampleRequest, answers: Sequence[_Answer]) -> SampleResult:
    if any(answer.finish_reason == PROMPT_TOO_LONG for answer in answers):
        return too_long(request)
    texts, reasons, counts = zip(*((one.text, one.finish_reason, one.tokens) for one in answers), strict=True)
    return SampleResult(request.key, texts, reasons, counts)


class OpenAISampler:
    """Asks for answers over HTTP; the key comes from the environment only.

    An answer that the endpoint fails to give, after the client's retries, is not sampled: it is counted, and the next
    run asks again. Raises UserError if the endpoint refuses the key, does not know a model's name, serves another model
    under it, refuses a sampling setting, or gives no answer at all. What was sampled is kept.
    """

    name = "openai"

    def __init__(self, options: SamplerOptions) -> None:
        endpoint = options.endpoint
        address = (endpoint.base_url if endpoint else None) or os.environ.get("OPENAI_BASE_URL")
        if endpoint is None or not address:
            raise UserError("evaluation.endpoint.base_url: not set; sampler: openai needs the server's address")
        self.endpoint, self._model = endpoint, options.model.path
        self._base = endpoint.served or options.model.path
        self._names = {path: endpoint.names.get(adapter_name(path), adapter_name(path)) for path in options.adapters}
        if (urlsplit(address).hostname or "").endswith("openai.com"):
            self._neutral = {name: NEUTRAL_SAMPLING[name] for name in _OPENAI_TAKES}
        else:
            self._neutral = NEUTRAL_SAMPLING if endpoint.send_all_settings else {}
        self._served: dict[str, Any] = {}
        self._failed: Counter[str] = Counter()
        self._failed_in_a_row = self._answered = 0
        self._room: dict[str, int] = {}  # request's key -> tokens of reply, where the context has no room for all
        self.used = Usage()

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Every request's result, when the last of its answers has come."""
        limits, key = CallLimits.of(self.endpoint), os.environ.get(self.endpoint.api_key_env) or "none"
        asyncio.run(self._check(replace(limits, max_retries=0), key))
        self.used = Usage()
        pool = OpenAIPool[_Answer](self.endpoint.base_url, key, concurrency=self.endpoint.concurrency, limits=limits)
        answers: dict[str, list[_Answer]] = {}

        def jobs() -> Iterator[Job[_Answer]]:
            for request in requests:
                for index in range(request.n):
                    yield partial(self._answer, request, index)

        for answer in pool.map(jobs()):
            request = answer.request
            complete = answers.setdefault(request.key, [])
            complete.append(answer)
            if len(complete) == request.n:
                yield _result(request, sorted(answers.pop(request.key), key=lambda one: one.index))
        if self.used.calls:
            log.info("%s took %s", self.endpoint.base_url, describe(self.used, self.endpoint))
        if self._room:
            log.warning(
                "%s has no room in its context for %d prompts and replies of the length asked for: "
                "their answers were cut, the shortest after %d tokens",
                self.endpoint.base_url,
                len(self._room),
                min(self._room.values()),
            )
        if self._failed:
            reason = self._failed.most_common(1)[0][0]
            if not self._answered:
                raise self._error(self._base, reason)
            log.warning(
                "%d answers could not be sampled (%s); they count in no rate, and the same command asks for them again",
                self._failed.total(),
                reason,
            )

    async def _check(self, limits: CallLimits, key: str) -> None:
        try:
            client = ChatClient(self.endpoint.base_url, key, limits)
        except CallError as error:
            raise UserError(f"evaluation.endpoint.base_url: {error}") from None
        try:
            self._served = await check_served(client, self._base, self._model, self._names)
        finally:
            await client.aclose()

    def _error(self, model: str, reason: str) -> UserError:
        return UserError(
            f"evaluation.endpoint: {self.endpoint.base_url}, model {model!r}: {reason}; what was sampled is kept"
        )

    async def _answer(self, request: SampleRequest, index: int, client: ChatClient) -> _Answer:
        model = self._base if request.adapter is None else self._names[request.adapter]
        try:
            found = await self._complete(request, index, model, client)
        except CallError as error:
            return self._without_answer(request, index, model, error)
        self._failed_in_a_row = 0
        self._answered += 1
        self._count(found, request)
        text = found.text
        if found.reasoning:  # as a model writes it
            text = f"<think>{found.reasoning}" + (f"</think>{text}" if text else "")
        return _Answer(request, index, found.finish_reason, text, found.completion_tokens or 0)

    async def _complete(self, request: SampleRequest, index: int, model: str, client: ChatClient) -> Completion:
        """One answer, shortened where the server's context has no room for all of it, as the other samplers do."""
        extra = {**self._neutral, **self.endpoint.extra_body}
        while True:
            limit = self._room.get(request.key, request.max_tokens)
            try:
                return await client.complete(
                    model=model,
                    messages=list(request.messages),
                    temperature=request.temperature,
                    top_p=request.top_p,
                    max_tokens=limit,
                    seed=request.seed + index,
                    **({"extra_body": extra} if extra else {}),
                )
            except CallError as error:
                least = 1 if error.room else _LEAST_TOKENS
                shorter = error.room if error.room and error.room < limit else limit // 2
                if not error.no_room or shorter < least:
                    self._room.pop(request.key, None)
                    raise
                self._room[request.key] = min(shorter, self._room.get(request.key, shorter))

    def _count(self, found: Completion, request: SampleRequest) -> None:
        """Add a call that was answered. What the server does not count is guessed from characters."""
        read, written = found.prompt_tokens, found.completion_tokens
        asked, said = sum(len(turn["content"]) for turn in request.messages), len(found.text + found.reasoning)
        self.used.add(
            Usage(
                1,
                asked // CHARACTERS_PER_TOKEN if read is None else read,
                said // CHARACTERS_PER_TOKEN if written is None else written,
                guessed=read is None or written is None,
            )
        )

    def _without_answer(self, request: SampleRequest, index: int, model: str, error: CallError) -> _Answer:
        """What a failed call means: a settled answer without text, or one that is not sampled. Raises UserError."""
        if error.too_long or error.filtered:
            self._answered += 1
            return _Answer(request, index, PROMPT_TOO_LONG if error.too_long else CONTENT_FILTER)
        refused = [name for name in self._neutral if name in str(error)]
        if refused and error.status in (400, 422):
            raise UserError(
                f"evaluation.endpoint: the server refuses {', '.join(refused)} ({error}); with evaluation.endpoint."
                "send_all_settings: false its own defaults apply, and the answers are kept apart from others"
            )
        if error.refused:
            raise self._error(model, str(error))
        self._failed[str(error)] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= max(10, self.endpoint.concurrency):
            raise self._error(model, f"{self._failed_in_a_row} failures in a row: {error}")
        return _Answer(request, index, NOT_SAMPLED)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Raises UserError: the protocol has no likelihood of a given answer."""
        raise UserError(
            "evaluation.sampler: openai gives no likelihoods of written answers; score choice suites with vllm or "
            "transformers"
        )

    def describe(self) -> dict[str, Any]:
        known = {"name": self.name, "base_url": self.endpoint.base_url, "served": self._base}
        return known | ({"models": self._served} if self._served else {})

    def close(self) -> None:
        """Nothing is held between requests."""


def adapter_name(path: str) -> str:
    """What an adapter folder is called on a server: its run's name (runs/NAME/adapter), else the folder's."""
    folder = Path(path)
    return folder.parent.name if folder.name == "adapter" else folder.name
