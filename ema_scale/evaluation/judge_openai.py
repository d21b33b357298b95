"""A judge behind an OpenAI-compatible endpoint: two questions an answer, scored as `judge_scores` says."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ema_scale.errors import UserError
from ema_scale.evaluation.budget import Budget, Hold
from ema_scale.evaluation.chat_reply import CONTENT_FILTER, first_choice, says_filtered, says_too_long
from ema_scale.evaluation.judge import JudgeItem, Judgement, Undone
from ema_scale.evaluation.judge_prompt import fill_all
from ema_scale.evaluation.judge_request import THINKING_LIMIT, THINKING_TOKENS, JudgeRequest
from ema_scale.evaluation.judge_scores import MAX_TOKENS, REQUIRED_PROMPTS, TOO_LONG, Reply, Rule, judgement
from ema_scale.evaluation.judges import missing_key

if TYPE_CHECKING:
    from ema_scale.recipe import JudgeRecipe

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
        self._request = JudgeRequest(model)
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
            return Undone(item.key, self.budget.spent, failed=False)
        try:
            replies = {name: await self._ask(client, prompt, hold) for name, prompt in prompts.items()}
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            if says_filtered(error):
                return Judgement(item.key, item.judge, dropped=CONTENT_FILTER)
            where = self.settings.base_url or "the OpenAI API"
            self._fatal = UserError(f"evaluation.judge: {where}, model {self.model!r}: {_short(error)}")
            return Undone(item.key, _short(error))
        except openai.BadRequestError as error:
            if says_filtered(error):  # it would be so for ever: settled, and counted by its reason
                return Judgement(item.key, item.judge, dropped=CONTENT_FILTER)
            if says_too_long(error):
                return Judgement(item.key, item.judge, dropped=TOO_LONG)
            self._failures_in_a_row += 1
            return Undone(item.key, _short(error))
        except _Filtered:
            return Judgement(item.key, item.judge, dropped=CONTENT_FILTER)
        except (openai.APIError, ValueError) as error:  # ValueError: a reply that is not what was promised
            self._failures_in_a_row += 1
            return Undone(item.key, _short(error))
        finally:
            hold.give_back()
        self._failures_in_a_row = 0
        return judgement(item.key, item.judge, replies, self.rule)

    async def _ask(self, client: Any, prompt: str, hold: Hold) -> Reply:
        """The judge's reply to one judging prompt. Raises openai.APIError, ValueError, _Filtered."""
        import openai

        request = self._request.of(prompt)
        try:
            reply = await client.chat.completions.create(**request)
        except (openai.BadRequestError, openai.PermissionDeniedError) as error:
            if not self._request.learn(error, request):
                raise
            return await self._ask(client, prompt, hold)
        usage = getattr(reply, "usage", None)
        hold.use(getattr(usage, "total_tokens", None))
        choice = first_choice(reply)
        text = choice.message.content or ""
        if not text and choice.finish_reason == CONTENT_FILTER:
            raise _Filtered
        if not text and choice.finish_reason == "length" and THINKING_LIMIT in request:
            raise ValueError(f"the judge thought for {THINKING_TOKENS} tokens and said nothing")
        tokens = getattr(choice.logprobs, "content", None) if choice.logprobs else None
        top = tuple((t.token, t.logprob) for t in tokens[0].top_logprobs) if tokens else None
        return Reply(text, top)


class _Filtered(Exception):
    """The endpoint has answered, and keeps the answer to itself."""


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
