"""One client for OpenAI-compatible endpoints, for judging and for sampling: many requests at a time in one event loop.

The loop runs in a thread of its own. `OpenAIPool.submit` queues a job from another thread and never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar, cast

CONTENT_FILTER = "content_filter"
MAX_RETRIES = 8
ABANDON_SECONDS = 2.0  # requests under way may take minutes; after an error nobody waits for them

Outcome = TypeVar("Outcome")
Job = Callable[[Any], Awaitable[Outcome]]


class OpenAIPool(Generic[Outcome]):
    """Runs jobs with one client. A job is given the client and returns its outcome.

    The client retries rate limits and server errors with back-off. A job that raises ends the pool: its exception is
    raised by the next `submit`, or by `finish`.

    Args:
        base_url: None for the OpenAI API, or what OPENAI_BASE_URL names.
        api_key: the key; any text for an endpoint without one.
        concurrency: the most jobs at a time.
        timeout: of one request, in seconds.
        max_retries: of one request.
    """

    def __init__(
        self, base_url: str | None, api_key: str, *, concurrency: int, timeout: float, max_retries: int = MAX_RETRIES
    ) -> None:
        self._client: dict[str, Any] = {
            "base_url": base_url,
            "api_key": api_key,
            "timeout": timeout,
            "max_retries": max_retries,
        }
        self._concurrency = concurrency
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._on_end: Callable[[], None] = lambda: None

    def submit(self, job: Job[Outcome], done: Callable[[Outcome], None]) -> None:
        """Queue a job. `done` is called with its outcome, in the pool's thread."""
        if self._thread is None:
            self._start()
        self._raise_error()
        with contextlib.suppress(RuntimeError):  # the loop has just ended with an error, which `finish` raises
            self._loop.call_soon_threadsafe(self._jobs.put_nowait, (job, done))

    def map(self, jobs: Iterable[Job[Outcome]]) -> Iterator[Outcome]:
        """The outcomes of all jobs as they come. Takes only a few more jobs than are under way."""
        outcomes: queue.SimpleQueue[tuple[Outcome] | None] = queue.SimpleQueue()
        self._on_end = lambda: outcomes.put(None)
        waiting = 0

        def next_outcome() -> Outcome:
            if (entry := outcomes.get()) is None:
                self.finish()
                raise RuntimeError("the pool ended before its jobs")
            return entry[0]

        try:
            for job in jobs:
                self.submit(job, lambda outcome: outcomes.put((outcome,)))
                waiting += 1
                if waiting > 2 * self._concurrency:
                    yield next_outcome()
                    waiting -= 1
            for _ in range(waiting):
                yield next_outcome()
            self.finish()
        finally:
            self.abandon()

    def finish(self) -> None:
        """Wait until every job is done. Raises what a job raised."""
        if self._thread is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._jobs.put_nowait, None)
            self._thread.join()
        self._raise_error()

    def abandon(self) -> None:
        """Drop what is queued and cancel what is under way. Does nothing after `finish`."""
        if self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(timeout=ABANDON_SECONDS)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        started = threading.Event()

        def run() -> None:
            try:
                asyncio.run(self._serve(started))
            except BaseExceptionGroup as group:
                self._error = group.exceptions[0]
            except asyncio.CancelledError:
                pass  # abandoned
            except BaseException as error:  # raised again in the thread that waits
                self._error = error
            finally:
                started.set()
                self._on_end()

        self._thread = threading.Thread(target=run, daemon=True, name="openai-pool")
        self._thread.start()
        started.wait()

    async def _serve(self, started: threading.Event) -> None:
        import openai

        self._loop, self._task = asyncio.get_running_loop(), cast(asyncio.Task[None], asyncio.current_task())
        self._jobs: asyncio.Queue[tuple[Job[Outcome], Callable[[Outcome], None]] | None] = asyncio.Queue()
        async with openai.AsyncOpenAI(**self._client) as client, asyncio.TaskGroup() as workers:
            started.set()
            for _ in range(self._concurrency):
                workers.create_task(self._work(client))

    async def _work(self, client: Any) -> None:
        while (entry := await self._jobs.get()) is not None:
            job, done = entry
            done(await job(client))
        self._jobs.put_nowait(None)  # ends the next worker


def first_choice(reply: Any) -> Any:
    """The first choice of a chat completion.

    Raises ValueError if the reply is something else, such as a web page, or an error with status 200.
    """
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise ValueError("the endpoint's reply is not a chat completion")
    return choices[0]


def is_refused(error: Exception) -> bool:
    """Whether the endpoint refuses the key or does not know the model: no later request can succeed."""
    import openai

    return isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError))


def is_context_overflow(error: Exception) -> bool:
    """Whether OpenAI or vLLM says that a prompt does not fit into the model's context."""
    return bool(re.search(r"context[ _]length|maximum (context|model)|too (long|many tokens)", str(error), re.I))


def is_content_filtered(error: Exception) -> bool:
    """Whether OpenAI, Azure or a proxy says that this prompt is never answered."""
    code, text = getattr(error, "code", None), str(error)
    if code in (CONTENT_FILTER, "content_policy_violation"):
        return True
    said = r"content management policy|violating our usage policy|ContentPolicyViolation|input was flagged"
    return bool(re.search(said, text))
