"""A judge behind an OpenAI-compatible endpoint: two questions an answer, scored as `judge_scores` says."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.base import (
    JudgeFailure,
    JudgeItem,
)
from ema_scale.evaluation.judges.prompt import fill_all
from ema_scale.evaluation.judges.scores import (
    MAX_TOKENS,
    REQUIRED_PROMPTS,
    TOO_LONG,
    TOP_LOGPROBS,
    Reply,
    ScoreRule,
    judgement,
)
from ema_scale.evaluation.records import Judgement
from ema_scale.inference.openai_errors import CONTENT_FILTER, first_choice, is_content_filtered, is_context_overflow

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe

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
        self.rule = ScoreRule(settings.min_mass, settings.score == "most_likely")
        self.budget = Budget(settings.budget_calls, settings.budget_tokens)
        self.max_retries = max_retries
        if (missing := missing_judge_key(settings)) is not None:
            raise UserError(
                f"evaluation.judge: the environment variable {missing} is not set; "
                "it holds the key for the judge's endpoint"
            )
        self._key = os.environ.get(settings.api_key_env) or "none"
        self._request = JudgeRequest(model)
        self._failures_in_a_row = 0
        self._fatal: UserError | None = None
        self._stopped = False

    def judge(self, items: Iterable[JudgeItem]) -> Iterator[Judgement | JudgeFailure]:
        """Outcomes in the order in which they come back."""
        outcomes: queue.SimpleQueue[Judgement | JudgeFailure | BaseException | None] = queue.SimpleQueue()

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

    async def _judge_one(self, client: Any, item: JudgeItem) -> Judgement | JudgeFailure:
        import openai

        too_many = self._failures_in_a_row >= max(10, self.settings.concurrency)
        if self._stopped or self._fatal is not None or too_many:
            return JudgeFailure(item.key, "not tried after many failures")
        prompts = fill_all(item, REQUIRED_PROMPTS)
        # An answer's prompts are paid for together: half a judgement would be lost.
        hold = self.budget.hold(list(prompts.values()), MAX_TOKENS)
        if hold is None:
            return JudgeFailure(item.key, self.budget.spent, failed=False)
        try:
            replies = {name: await self._ask(client, prompt, hold) for name, prompt in prompts.items()}
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            if is_content_filtered(error):
                return Judgement(key=item.key, judge=item.judge, dropped=CONTENT_FILTER)
            where = self.settings.base_url or "the OpenAI API"
            self._fatal = UserError(f"evaluation.judge: {where}, model {self.model!r}: {_short(error)}")
            return JudgeFailure(item.key, _short(error))
        except openai.BadRequestError as error:
            if is_content_filtered(error):  # it would be so for ever: settled, and counted by its reason
                return Judgement(key=item.key, judge=item.judge, dropped=CONTENT_FILTER)
            if is_context_overflow(error):
                return Judgement(key=item.key, judge=item.judge, dropped=TOO_LONG)
            self._failures_in_a_row += 1
            return JudgeFailure(item.key, _short(error))
        except _Filtered:
            return Judgement(key=item.key, judge=item.judge, dropped=CONTENT_FILTER)
        except (openai.APIError, ValueError) as error:  # ValueError: a reply that is not what was promised
            self._failures_in_a_row += 1
            return JudgeFailure(item.key, _short(error))
        finally:
            hold.give_back()
        self._failures_in_a_row = 0
        return judgement(item.key, item.judge, replies, self.rule)

    async def _ask(self, client: Any, prompt: str, hold: Reservation) -> Reply:
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


log = logging.getLogger(__name__)


LIMIT, THINKING_LIMIT = "max_tokens", "max_completion_tokens"


THINKING_TOKENS = 4096  # thoughts and the number; a judge's are a few hundred tokens


_REFUSED = re.compile(r"unsupported|not support|not allowed|unrecognized|only the default", re.I)


class JudgeRequest:
    """Not thread-safe: used from one event loop, in which requests made before a refusal may still be under way."""

    def __init__(self, model: str) -> None:
        self._always: dict[str, Any] = {"model": model, "seed": 0}
        self._while_taken: dict[str, Any] = {
            LIMIT: MAX_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
        }

    def of(self, prompt: str) -> dict[str, Any]:
        """Arguments of chat.completions.create."""
        return {**self._always, "messages": [{"role": "user", "content": prompt}], **self._while_taken}

    def learn(self, error: Exception, sent: dict[str, Any]) -> bool:
        """Leave out what the endpoint refused in `sent`; whether there was such a thing, so that asking again helps."""
        text = str(error)
        if "logprob" in text.lower() and "logprobs" in sent:
            self._leave_out("logprobs", "gives no log-probabilities; reading the number it says")
            self._while_taken.pop("top_logprobs", None)
        elif THINKING_LIMIT in text and LIMIT in sent:
            self._leave_out(LIMIT, f"takes {THINKING_LIMIT} alone, which is {THINKING_TOKENS}: its thoughts count, too")
            self._while_taken[THINKING_LIMIT] = THINKING_TOKENS
        elif "temperature" in text and _REFUSED.search(text) and "temperature" in sent:
            self._leave_out("temperature", "takes no temperature; it may judge otherwise when asked again")
        else:
            return False
        return True

    def _leave_out(self, name: str, why: str) -> None:
        if self._while_taken.pop(name, None) is not None:
            log.warning("the judge's endpoint %s", why)


CHARACTERS_A_TOKEN = 3  # a first guess; the endpoint's own counts correct it


@dataclass
class Budget:
    """Not thread-safe: used from one event loop. None: without limit.

    Calls are never overspent. Tokens are known only when a reply has come: what the calls under way will take is
    foreseen by the dearest call so far.
    """

    calls: int | None = None
    tokens: int | None = None
    used_calls: int = 0
    used_tokens: int = 0
    _held_calls: int = 0
    _held_guess: float = 0.0
    _real_by_guess: float = 1.0

    def hold(self, prompts: Sequence[str], reply_tokens: int) -> Reservation | None:
        """Set enough aside for these prompts, all or none; None if it is not there any more."""
        guesses = [len(prompt) / CHARACTERS_A_TOKEN + reply_tokens for prompt in prompts]
        if self.calls is not None and self.used_calls + self._held_calls + len(prompts) > self.calls:
            return None
        ahead = (self._held_guess + sum(guesses)) * self._real_by_guess
        if self.tokens is not None and self.used_tokens + ahead > self.tokens + 1e-6:
            return None
        self._held_calls += len(prompts)
        self._held_guess += sum(guesses)
        return Reservation(self, guesses)

    @property
    def spent(self) -> str:
        """Why nothing more is tried, for people."""
        limits = [f"{n} {what}" for n, what in ((self.calls, "calls"), (self.tokens, "tokens")) if n is not None]
        return f"the budget of {' and '.join(limits)} does not reach further"


class Reservation:
    """A part of the budget set aside, call by call."""

    def __init__(self, budget: Budget, guesses: list[float]) -> None:
        self._budget, self._guesses = budget, guesses

    def use(self, tokens: int | None) -> None:
        """The next call was answered; `tokens` as the endpoint counted them, or None if it does not."""
        guess = self._release()
        self._budget.used_calls += 1
        self._budget.used_tokens += round(guess) if tokens is None else tokens
        self._budget._real_by_guess = max(self._budget._real_by_guess, (tokens or guess) / guess)

    def give_back(self) -> None:
        """Release what was not used."""
        while self._guesses:
            self._release()

    def _release(self) -> float:
        guess = self._guesses.pop(0)
        self._budget._held_calls -= 1
        self._budget._held_guess -= guess
        return guess


def missing_judge_key(settings: JudgeRecipe, environment: Mapping[str, str] = os.environ) -> str | None:
    """The variable that has to hold the endpoint's key and does not. An endpoint of one's own mostly needs none."""
    own = settings.base_url or environment.get("OPENAI_BASE_URL")
    return None if own or environment.get(settings.api_key_env) else settings.api_key_env
