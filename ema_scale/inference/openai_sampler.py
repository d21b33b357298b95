"""Sampling from an OpenAI-compatible server that is running already, such as `vllm serve` on several nodes.

The server holds the base model and its LoRA adapters under names; one request an answer, each with its own seed,
many at a time. Reasoning that the server splits off is put back before the answer, as a model writes it, so that
it is kept as with the other samplers.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.inference.base import SampleRequest, SampleResult, SamplerOptions, too_long
from ema_scale.inference.openai_errors import first_choice, is_context_overflow

MAX_RETRIES = 8


TIMEOUT_SECONDS = 600.0


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
        """Every request's answers, when the last of them has come."""
        outcomes: queue.SimpleQueue[SampleResult | BaseException | None] = queue.SimpleQueue()

        def run() -> None:
            try:
                asyncio.run(self._sample_all(requests, outcomes))
                outcomes.put(None)
            except BaseExceptionGroup as group:
                outcomes.put(group.exceptions[0])
            except BaseException as error:  # handed to the thread that waits
                outcomes.put(error)

        threading.Thread(target=run, daemon=True, name="sampler-http").start()
        while (outcome := outcomes.get()) is not None:
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome

    async def _sample_all(self, requests: Iterable[SampleRequest], outcomes: Any) -> None:
        import openai

        room = asyncio.Semaphore(self.endpoint.concurrency)
        key = os.environ.get(self.endpoint.api_key_env) or "none"
        async with (
            openai.AsyncOpenAI(
                api_key=key, base_url=self.endpoint.base_url, max_retries=MAX_RETRIES, timeout=TIMEOUT_SECONDS
            ) as client,
            asyncio.TaskGroup() as tasks,
        ):

            async def finish(request: SampleRequest, answers: list[asyncio.Task[tuple[str, str, int]]]) -> None:
                found = [await answer for answer in answers]
                if any(reason == "" for _, reason, _ in found):
                    outcomes.put(too_long(request))
                else:
                    texts, reasons, counts = zip(*found, strict=True)
                    outcomes.put(SampleResult(request.key, texts, reasons, counts))

            for request in requests:
                answers = []
                for index in range(request.n):
                    await room.acquire()
                    answers.append(tasks.create_task(self._one(client, request, index, room)))
                tasks.create_task(finish(request, answers))

    async def _one(
        self, client: Any, request: SampleRequest, index: int, room: asyncio.Semaphore
    ) -> tuple[str, str, int]:
        """(text, finish reason, tokens) of one answer; finish reason "" if the prompt does not fit."""
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
                return "", "", 0
            raise UserError(f"evaluation.endpoint: model {model!r}: {error}") from None
        except (openai.APIError, ValueError) as error:  # ValueError: a reply that is not what was promised
            raise UserError(
                f"evaluation.endpoint: {self.endpoint.base_url}, model {model!r}: {type(error).__name__}: {error}; "
                "what was sampled is kept"
            ) from None
        finally:
            room.release()
        text, usage = choice.message.content or "", reply.usage
        # Servers differ in what they call it; neither is in OpenAI's own types.
        extra = choice.message.model_extra or {}
        if reasoning := extra.get("reasoning_content") or extra.get("reasoning"):
            text = f"<think>{reasoning}" + (f"</think>{text}" if text else "")
        return text, str(choice.finish_reason), usage.completion_tokens if usage else 0

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "base_url": self.endpoint.base_url, "served": self._base}

    def close(self) -> None:
        """Nothing is held between requests."""


def adapter_name(path: str) -> str:
    """What an adapter folder is called on a server: its run's name (runs/NAME/adapter), else the folder's."""
    folder = Path(path)
    return folder.parent.name if folder.name == "adapter" else folder.name
