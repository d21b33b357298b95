"""A judge behind an OpenAI-compatible endpoint: one request per prompt and answer, scored by `judges.scores`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.base import (
    JudgeFailure,
    JudgeItem,
)
from ema_scale.evaluation.judges.prompt import fill_all
from ema_scale.evaluation.judges.scores import (
    MAX_TOKENS,
    TOO_LONG,
    TOP_LOGPROBS,
    Reply,
    ScoreRule,
    judgement,
)
from ema_scale.evaluation.records import Judgement
from ema_scale.inference.openai_pool import (
    CONTENT_FILTER,
    MAX_RETRIES,
    OpenAIPool,
    first_choice,
    is_content_filtered,
    is_context_overflow,
    is_refused,
)

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 120.0
LIMIT, THINKING_LIMIT = "max_tokens", "max_completion_tokens"
THINKING_TOKENS = 4096  # thoughts and the number; a judge's are a few hundred tokens
CHARACTERS_PER_TOKEN = 3  # a first guess; the endpoint's own counts correct it
_REFUSED = re.compile(r"unsupported|not support|not allowed|unrecognized|only the default", re.I)


class OpenAIJudge:
    """Judges over HTTP, many answers at a time. The key comes from the environment only.

    Raises UserError if the endpoint refuses the key or does not know the model. After any other failure the answer is
    not judged. Nothing more is tried after many failures in a row, or when the budget is spent.
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
        self._pool = OpenAIPool[Judgement | JudgeFailure](
            settings.base_url,
            os.environ.get(settings.api_key_env) or "none",
            concurrency=settings.concurrency,
            timeout=TIMEOUT_SECONDS,
            max_retries=max_retries,
        )
        self._request = JudgeRequest(model)
        self._failures_in_a_row = 0
        self._fatal: UserError | None = None
        self._stopped = False

    def submit(self, item: JudgeItem, done: Callable[[Judgement | JudgeFailure], None]) -> None:
        """Queue an item. `done` gets its outcome, in another thread."""
        if self._fatal is not None:
            raise self._fatal
        self._pool.submit(partial(self._judge_one, item), done)

    def finish(self) -> None:
        self._pool.finish()
        if self._fatal is not None:
            raise self._fatal

    def abandon(self) -> None:
        self._stopped = True  # what is still queued must not be paid for
        self._pool.abandon()

    async def _judge_one(self, item: JudgeItem, client: Any) -> Judgement | JudgeFailure:
        import openai

        too_many = self._failures_in_a_row >= max(10, self.settings.concurrency)
        if self._stopped or self._fatal is not None or too_many:
            return JudgeFailure(item.key, "not tried after many failures")
        prompts = fill_all(item)
        # An answer's prompts are paid for together: half a judgement would be lost.
        hold = self.budget.hold(list(prompts.values()), MAX_TOKENS)
        if hold is None:
            return JudgeFailure(item.key, self.budget.spent, failed=False)
        try:
            replies = {name: await self._ask(client, prompt, hold) for name, prompt in prompts.items()}
        except _Filtered:
            return Judgement(key=item.key, judge=item.judge, dropped=CONTENT_FILTER)
        except (openai.APIError, ValueError) as error:  # ValueError: a reply that is not what was promised
            return self._failed(item, error)
        finally:
            hold.give_back()
        self._failures_in_a_row = 0
        return judgement(item.key, item.judge, replies, self.rule)

    def _failed(self, item: JudgeItem, error: Exception) -> Judgement | JudgeFailure:
        import openai

        answered = is_refused(error) or isinstance(error, openai.BadRequestError)
        if answered and is_content_filtered(error):  # asking again would not help: settled, and counted by its reason
            return Judgement(key=item.key, judge=item.judge, dropped=CONTENT_FILTER)
        if isinstance(error, openai.BadRequestError) and is_context_overflow(error):
            return Judgement(key=item.key, judge=item.judge, dropped=TOO_LONG)
        if is_refused(error):
            where = self.settings.base_url or "the OpenAI API"
            self._fatal = UserError(f"evaluation.judge: {where}, model {self.model!r}: {_short(error)}")
        else:
            self._failures_in_a_row += 1
        return JudgeFailure(item.key, _short(error))

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
    """The endpoint's content filter removed the reply."""


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


class JudgeRequest:
    """The arguments of a request, without those that the endpoint has refused.

    Not thread-safe: used from one event loop. Requests made before a refusal may still be under way.
    """

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
        """Leave out what the endpoint refused in `sent`. Returns whether there was such a thing: then ask again."""
        text = str(error)
        if "logprob" in text.lower() and "logprobs" in sent:
            self._leave_out("logprobs", "gives no log-probabilities; reading the number it says")
            self._while_taken.pop("top_logprobs", None)
        elif THINKING_LIMIT in text and LIMIT in sent:
            self._leave_out(LIMIT, f"takes only {THINKING_LIMIT}; it is {THINKING_TOKENS}, as reasoning counts")
            self._while_taken[THINKING_LIMIT] = THINKING_TOKENS
        elif "temperature" in text and _REFUSED.search(text) and "temperature" in sent:
            self._leave_out("temperature", "takes no temperature; it may judge an answer differently each time")
        else:
            return False
        return True

    def _leave_out(self, name: str, why: str) -> None:
        if self._while_taken.pop(name, None) is not None:
            log.warning("the judge's endpoint %s", why)


@dataclass
class Budget:
    """Limits on calls and tokens; None is no limit. Not thread-safe: used from one event loop.

    Calls are never overspent. Tokens are known only when a reply has come, so that calls under way are counted with
    the tokens of the dearest call so far.
    """

    calls: int | None = None
    tokens: int | None = None
    used_calls: int = 0
    used_tokens: int = 0
    _held_calls: int = 0
    _held_guess: float = 0.0
    _real_by_guess: float = 1.0

    def hold(self, prompts: Sequence[str], reply_tokens: int) -> Reservation | None:
        """Reserve enough for all of these prompts; None if the rest of the budget is too small."""
        guesses = [len(prompt) / CHARACTERS_PER_TOKEN + reply_tokens for prompt in prompts]
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
    """Name of the missing API-key variable, or None. An endpoint with a base_url is taken to need no key."""
    own = settings.base_url or environment.get("OPENAI_BASE_URL")
    return None if own or environment.get(settings.api_key_env) else settings.api_key_env
