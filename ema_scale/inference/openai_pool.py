"""One client for OpenAI-compatible endpoints, for judging and for sampling: many requests at a time in one event loop.

The loop runs in a thread of its own. `OpenAIPool.submit` queues a job from another thread and never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Generic, TypeVar, cast

from ema_scale.core.errors import UserError
from ema_scale.inference.chat_client import CallError, CallLimits, ChatClient

log = logging.getLogger(__name__)

SILENT_SECONDS = 10.0
ABANDON_SECONDS = 2.0  # requests under way may take minutes; after an error nobody waits for them

Outcome = TypeVar("Outcome")
Job = Callable[[ChatClient], Awaitable[Outcome]]


class OpenAIPool(Generic[Outcome]):
    """Runs jobs with one client. A job is given the client and returns its outcome.

    The client retries rate limits and server errors with back-off. A job that raises ends the pool: its exception is
    raised by the next `submit`, or by `finish`. Where nothing comes back for ten seconds, the log says so.

    Args:
        base_url: None for the OpenAI API, or what OPENAI_BASE_URL names.
        api_key: the key; any text for an endpoint without one.
        concurrency: the most jobs at a time.
        limits: of each call.
    """

    def __init__(self, base_url: str | None, api_key: str, *, concurrency: int, limits: CallLimits) -> None:
        self._client = (base_url, api_key, limits)
        self._concurrency = concurrency
        self._under_way, self._last_outcome = 0, time.monotonic()
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
        self._loop, self._task = asyncio.get_running_loop(), cast(asyncio.Task[None], asyncio.current_task())
        self._jobs: asyncio.Queue[tuple[Job[Outcome], Callable[[Outcome], None]] | None] = asyncio.Queue()
        try:
            client = ChatClient(*self._client)
        except CallError as error:
            raise UserError(f"base_url: {self._client[0]}: {error}") from None
        try:
            started.set()
            watch = asyncio.create_task(self._watch(client))
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._concurrency):
                    workers.create_task(self._work(client))
            watch.cancel()
        finally:
            await client.aclose()

    async def _work(self, client: ChatClient) -> None:
        while (entry := await self._jobs.get()) is not None:
            job, done = entry
            if not self._under_way:
                self._last_outcome = time.monotonic()
            self._under_way += 1
            try:
                done(await job(client))
            finally:
                self._under_way -= 1
                self._last_outcome = time.monotonic()
        self._jobs.put_nowait(None)  # ends the next worker

    async def _watch(self, client: ChatClient) -> None:
        """Say on what the pool waits: after ten seconds without an outcome, and each time the wait has doubled."""
        said = 0.0
        while True:
            await asyncio.sleep(1)
            waited = time.monotonic() - self._last_outcome if self._under_way else 0.0
            if waited < SILENT_SECONDS:
                said = 0.0
            elif waited >= 2 * said:
                said = waited
                why = f" ({client.trouble})" if client.trouble else ""
                log.info("waiting for %s for %.0f s%s", client.base_url or "the OpenAI API", waited, why)
