"""A judge behind an OpenAI-compatible endpoint: two questions an answer, scored as `judge_scores` says."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ema_scale.errors import UserError
from ema_scale.evaluation.budget import Budget, Hold
from ema_scale.evaluation.judge import JudgeItem, Judgement, Undone
from ema_scale.evaluation.judge_prompt import fill_all
from ema_scale.evaluation.judge_scores import (
    MAX_TOKENS,
    REQUIRED_PROMPTS,
    TOO_LONG,
    TOP_LOGPROBS,
    Reply,
    Rule,
    judgement,
)
from ema_scale.evaluation.judges import missing_key

if TYPE_CHECKING:
    from ema_scale.recipe import JudgeRecipe

log = logging.getLogger(__name__)

MAX_RETRIES = 8
TIMEOUT_SECONDS = 120.0


class OpenAIJudge:
    """Judges over HTTP, many requests at a time; the key comes from the environment only.

    Raises UserError if the endpoint refuses the key or does not know the model. Other failures, after the
    client's own retries with back-off, leave a judgement undone; after many in a row nothing more is tried, nor is
    anything when the budget is spent.
    """

    paid = True

    def __init__(self, settings: JudgeRecipe, model: str, *, max_retries: int = MAX_RETRIES) -> None:
        self.settings, self.model = settings, model
        self.rule = Rule(settings.min_mass, settings.score == "most_likely")
        self.budget = Budget(settings.budget_calls, settings.budget_tokens)
        self.max_retries = max_retries
        if (missing := missing_key(settings)) is not None:
            raise UserError(
                f"evaluation.judge: the environment variable {missing} is not set; "
                "it holds the key for the judge's endpoint"
            )
        self._key = os.environ.get(settings.api_key_env) or "none"
        self._logprobs = True
        self._failures_in_a_row = 0
        self._fatal: UserError | None = None
        self._stopped = False

    def judge(self, items: Iterable[JudgeItem]) -> Iterator[Judgement | Undone]:
        """Outcomes in the order in which they come back."""
        outcomes: queue.SimpleQueue[Judgement | Undone | BaseException | None] = queue.SimpleQueue()

        def run() -> None:
            try:
                asyncio.run(self._judge_all(items, outcomes))
                outcomes.put(None)
            except BaseException as error:  # handed to the thread that waits
                outcomes.put(error)

        threading.Thread(target=run, daemon=True, name="judge-http").start()
        try:
            while (outcome := outcomes.get()) is not None:
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
                if self._fatal is not None:
                    raise self._fatal
        finally:
            self._stopped = True  # if the caller gave up, what is still queued must not be paid for

    async def _judge_all(self, items: Iterable[JudgeItem], outcomes: Any) -> None:
        import openai

        loop, room = asyncio.get_running_loop(), asyncio.Semaphore(self.settings.concurrency)
        waiting = iter(items)
        async with (
            openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self.settings.base_url,
                max_retries=self.max_retries,
                timeout=TIMEOUT_SECONDS,
            ) as client,
            asyncio.TaskGroup() as tasks,
        ):

            async def one(item: JudgeItem) -> None:
                try:
                    outcomes.put(await self._judge_one(client, item))
                finally:
                    room.release()

            while True:
                await room.acquire()
                # The next item may not have been sampled yet: wait for it without holding up the others.
                item = await loop.run_in_executor(None, next, waiting, None)
                if item is None:
                    return
                tasks.create_task(one(item))

    async def _judge_one(self, client: Any, item: JudgeItem) -> Judgement | Undone:
        import openai

        too_many = self._failures_in_a_row >= max(10, self.settings.concurrency)
        if self._stopped or self._fatal is not None or too_many:
            return Undone(item.key, "not tried after many failures")
        prompts = fill_all(item, REQUIRED_PROMPTS)
        # An answer's prompts are paid for together: half a judgement would be lost.
        hold = self.budget.hold(list(prompts.values()), MAX_TOKENS)
        if hold is None:
            return Undone(item.key, self.budget.spent)
        try:
            replies = {name: await self._ask(client, prompt, hold) for name, prompt in prompts.items()}
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            where = self.settings.base_url or "the OpenAI API"
            self._fatal = UserError(f"evaluation.judge: {where}, model {self.model!r}: {_short(error)}")
            return Undone(item.key, _short(error))
        except openai.BadRequestError as error:
            if says_too_long(error):  # it would be so for ever: settled, and counted by its reason
                return Judgement(item.key, item.judge, dropped=TOO_LONG)
            self._failures_in_a_row += 1
            return Undone(item.key, _short(error))
        except (openai.APIError, ValueError) as error:  # ValueError: a reply that is not what was promised
            self._failures_in_a_row += 1
            return Undone(item.key, _short(error))
        finally:
            hold.give_back()
        self._failures_in_a_row = 0
        return judgement(item.key, item.judge, replies, self.rule)

    async def _ask(self, client: Any, prompt: str, hold: Hold) -> Reply:
        """The judge's reply to one judging prompt. Raises openai.APIError, ValueError."""
        import openai

        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "seed": 0,
        }
        asked_logprobs = self._logprobs
        if asked_logprobs:
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            reply = await client.chat.completions.create(**request)
        except openai.BadRequestError as error:
            if not asked_logprobs or "logprob" not in str(error).lower():
                raise
            if self._logprobs:
                log.warning("the judge's endpoint gives no log-probabilities; reading the number it says")
            self._logprobs = False
            return await self._ask(client, prompt, hold)
        usage = getattr(reply, "usage", None)
        hold.use(getattr(usage, "total_tokens", None))
        choices = getattr(reply, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise ValueError("the endpoint's reply is not a chat completion")
        tokens = getattr(choices[0].logprobs, "content", None) if choices[0].logprobs else None
        top = tuple((t.token, t.logprob) for t in tokens[0].top_logprobs) if tokens else None
        return Reply(choices[0].message.content or "", top)


def says_too_long(error: Exception) -> bool:
    """OpenAI's and vLLM's ways of saying that a prompt does not fit into the model's context."""
    return bool(re.search(r"context[ _]length|maximum (context|model)|too (long|many tokens)", str(error), re.I))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
