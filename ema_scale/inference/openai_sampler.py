"""Sampling from an OpenAI-compatible server that is running already, such as `vllm serve` on several nodes.

The server holds the base model and its LoRA adapters under names. There is one request per answer, each with its own
seed. Reasoning that the server splits off is put back before the answer, as a model writes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.inference.base import SampleRequest, SampleResult, SamplerOptions, ScoreRequest, ScoreResult, too_long
from ema_scale.inference.openai_pool import Job, OpenAIPool, first_choice, is_context_overflow

TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class _Answer:
    """One answer. finish_reason: "" if the prompt does not fit into the model's context."""

    request: SampleRequest
    index: int
    text: str = ""
    finish_reason: str = ""
    tokens: int = 0


def _result(request: SampleRequest, answers: Sequence[_Answer]) -> SampleResult:
    if any(answer.finish_reason == "" for answer in answers):
        return too_long(request)
    texts, reasons, counts = zip(*((one.text, one.finish_reason, one.tokens) for one in answers), strict=True)
    return SampleResult(request.key, texts, reasons, counts)


class OpenAISampler:
    """Asks for answers over HTTP; the key comes from the environment only.

    Raises UserError if the endpoint refuses the key, does not know a model's name, or does not answer after the
    client's retries. What was sampled is kept.
    """

    name = "openai"

    def __init__(self, options: SamplerOptions) -> None:
        endpoint = options.endpoint
        if endpoint is None or not (endpoint.base_url or os.environ.get("OPENAI_BASE_URL")):
            raise UserError("evaluation.endpoint.base_url: not set; sampler: openai needs the server's address")
        self.endpoint = endpoint
        self._base = endpoint.served or options.model.path
        self._names = {path: endpoint.names.get(adapter_name(path), adapter_name(path)) for path in options.adapters}
        self._closed = False

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Every request's result, when the last of its answers has come."""
        pool = OpenAIPool[_Answer](
            self.endpoint.base_url,
            os.environ.get(self.endpoint.api_key_env) or "none",
            concurrency=self.endpoint.concurrency,
            timeout=TIMEOUT_SECONDS,
        )
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

    async def _answer(self, request: SampleRequest, index: int, client: Any) -> _Answer:
        import openai

        model = self._base if request.adapter is None else self._names[request.adapter]
        try:
            reply = await client.chat.completions.create(
                model=model,
                messages=list(request.messages),
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_tokens,
                seed=request.seed + index,
            )
            choice = first_choice(reply)
        except openai.BadRequestError as error:
            if is_context_overflow(error):
                return _Answer(request, index)
            raise UserError(f"evaluation.endpoint: model {model!r}: {error}") from None
        except (openai.APIError, ValueError) as error:  # ValueError: a reply that is not what was promised
            raise UserError(
                f"evaluation.endpoint: {self.endpoint.base_url}, model {model!r}: {type(error).__name__}: {error}; "
                "what was sampled is kept"
            ) from None
        text, usage = choice.message.content or "", reply.usage
        # Servers differ in what they call it; neither is in OpenAI's own types.
        extra = choice.message.model_extra or {}
        if reasoning := extra.get("reasoning_content") or extra.get("reasoning"):
            text = f"<think>{reasoning}" + (f"</think>{text}" if text else "")
        return _Answer(request, index, text, str(choice.finish_reason), usage.completion_tokens if usage else 0)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Raises UserError: the protocol has no likelihood of a given answer."""
        raise UserError(
            "evaluation.sampler: openai gives no likelihoods of written answers; score choice suites with vllm or "
            "transformers"
        )

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "base_url": self.endpoint.base_url, "served": self._base}

    def close(self) -> None:
        """Nothing is held between requests."""


def adapter_name(path: str) -> str:
    """What an adapter folder is called on a server: its run's name (runs/NAME/adapter), else the folder's."""
    folder = Path(path)
    return folder.parent.name if folder.name == "adapter" else folder.name
