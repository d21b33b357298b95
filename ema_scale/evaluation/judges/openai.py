"""A judge behind an OpenAI-compatible endpoint: one request per judging prompt, scored by `judges.scores`."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.base import JudgeFailure, JudgeItem
from ema_scale.evaluation.judges.budget import Budget, Reservation
from ema_scale.evaluation.judges.prompt import fill_all
from ema_scale.evaluation.judges.reply_grammar import UNFINISHED, read_reply
from ema_scale.evaluation.judges.scores import (
    MAX_TOKENS,
    THINKING_TOKENS,
    TOO_LONG,
    TOP_LOGPROBS,
    WORDS_TOKENS,
    Reply,
    ScoreRule,
    judgement,
    needs_more,
)
from ema_scale.evaluation.records import Judgement
from ema_scale.inference.base import NEUTRAL_SAMPLING
from ema_scale.inference.chat_client import MAX_RETRIES, CallError, CallLimits, ChatClient
from ema_scale.inference.completion import CONTENT_FILTER, Completion
from ema_scale.inference.openai_pool import OpenAIPool
from ema_scale.inference.thoughts import split_reasoning
from ema_scale.inference.usage import Usage

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe

log = logging.getLogger(__name__)

LIMIT, THINKING_LIMIT = "max_tokens", "max_completion_tokens"
FIRST_REPLIES = 3  # so many thoughts without an end, before any verdict, end the judging
_REFUSED = re.compile(r"unsupported|not support|not allowed|unrecognized|unknown|extra|only the default", re.I)


class OpenAIJudge:
    """Judges over HTTP, many answers at a time. The key comes from the environment only.

    The first answer is judged alone: it shows what the endpoint refuses, and how many tokens this judge's replies take.

    Raises UserError if the endpoint refuses the key, does not know the model or redirects to another host, and if the
    first replies are all thoughts that do not end. After any other failure the answer is not judged. Nothing more is
    tried after many failures in a row, or when the budget is spent.
    """

    paid = True

    def __init__(self, settings: JudgeRecipe, model: str, *, max_retries: int = MAX_RETRIES) -> None:
        self.settings, self.model = settings, model
        self.rule = ScoreRule(settings.min_mass, settings.score == "most_likely")
        self.budget = Budget(settings.budget_calls, settings.budget_tokens)
        if (missing := missing_judge_key(settings)) is not None:
            raise UserError(
                f"evaluation.judge: the environment variable {missing} is not set; "
                "it holds the key for the judge's endpoint"
            )
        self._pool = OpenAIPool[Judgement | JudgeFailure](
            settings.base_url,
            os.environ.get(settings.api_key_env) or "none",
            concurrency=settings.concurrency,
            limits=CallLimits.of(settings, max_retries),
        )
        own_server = bool(settings.base_url or os.environ.get("OPENAI_BASE_URL"))
        self._request = JudgeRequest(
            model, settings.max_tokens, settings.extra_body, NEUTRAL_SAMPLING if own_server else {}
        )
        self._first = asyncio.Lock()
        self._knows_replies = False
        self._thoughts_without_end = 0
        self._failures_in_a_row = 0
        self._fatal: UserError | None = None
        self._stopped = False

    @property
    def used(self) -> Usage:
        return self.budget.used

    def submit(self, item: JudgeItem, done: Callable[[Judgement | JudgeFailure], None]) -> None:
        """Queue an item. `done` gets its outcome, in another thread."""
        if self._fatal is not None:
            raise self._fatal
        self._pool.submit(partial(self._judge_in_turn, item), done)

    def finish(self) -> None:
        self._pool.finish()
        if self._fatal is not None:
            raise self._fatal

    def abandon(self) -> None:
        self._stopped = True  # what is still queued must not be paid for
        self._pool.abandon()

    async def _judge_in_turn(self, item: JudgeItem, client: ChatClient) -> Judgement | JudgeFailure:
        async with self._first:
            if not self._knows_replies:
                return await self._judge(item, client)
        return await self._judge(item, client)

    async def _judge(self, item: JudgeItem, client: ChatClient) -> Judgement | JudgeFailure:
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
        except _BudgetSpent:
            return JudgeFailure(item.key, self.budget.spent, failed=False)
        except _Filtered:
            return Judgement(key=item.key, judge=item.judge, dropped=CONTENT_FILTER)
        except _Unfinished as error:
            return self._unfinished(item, str(error))
        except CallError as error:
            return self._failed(item, error)
        finally:
            hold.give_back()
        self._failures_in_a_row = 0
        self._knows_replies = True
        row = judgement(item.key, item.judge, replies, self.rule)
        return row.model_copy(update={"usage": hold.used.to_row()})

    def _unfinished(self, item: JudgeItem, reason: str) -> JudgeFailure:
        """A thought without an end. Nothing of it is stored; if the first replies are all like that, judging ends."""
        self._thoughts_without_end += 1
        if not self._knows_replies and self._thoughts_without_end >= FIRST_REPLIES:
            self._fatal = UserError(
                f"evaluation.judge: {self.model!r}: {reason}, in each of the first {FIRST_REPLIES} replies; "
                "nothing was stored. Raise evaluation.judge.max_tokens (the server's context has to hold it), or turn "
                "its thinking off, such as "
                "evaluation.judge.extra_body={chat_template_kwargs: {enable_thinking: false}}"
            )
        return JudgeFailure(item.key, reason)

    def _failed(self, item: JudgeItem, error: CallError) -> Judgement | JudgeFailure:
        if error.filtered:  # asking again would not help: settled, and counted by its reason
            return Judgement(key=item.key, judge=item.judge, dropped=CONTENT_FILTER)
        if error.too_long:
            return Judgement(key=item.key, judge=item.judge, dropped=TOO_LONG)
        if error.refused:
            where = self.settings.base_url or "the OpenAI API"
            self._fatal = UserError(f"evaluation.judge: {where}, model {self.model!r}: {error}")
        else:
            self._failures_in_a_row += 1
            self._knows_replies = True  # how it replies is not known, but waiting in turn would help nobody
        return JudgeFailure(item.key, str(error))

    async def _ask(self, client: ChatClient, prompt: str, hold: Reservation) -> Reply:
        """The judge's reply to one judging prompt. Raises CallError, _Filtered, _Unfinished, _BudgetSpent."""
        while True:
            request = self._request.of(prompt)
            try:
                found = await client.complete(**request)
            except CallError as error:
                if not self._request.learn(error, request, prompt):
                    raise
                continue
            hold.use(found.prompt_tokens, found.completion_tokens)
            if not found.text and found.finish_reason == CONTENT_FILTER:
                raise _Filtered
            reply = reply_of(found)
            if found.finish_reason != "length" or not needs_more(reply):
                return reply
            thinks = bool(found.reasoning) or not found.text or read_reply(reply.text).missing == UNFINISHED
            if self._request.ask_for_more(request, prompt, thinks):
                if not hold.hold([prompt], MAX_TOKENS):
                    raise _BudgetSpent
            elif thinks:
                raise _Unfinished(f"the judge thought for {_limit(request)} tokens and said nothing")
            else:
                return reply


def reply_of(found: Completion) -> Reply:
    """A completion as a judge's reply, its thought left out."""
    text = found.text
    if found.reasoning and not split_reasoning(text)[0]:
        ends = "</think>" if text or found.finish_reason != "length" else ""
        text = f"<think>{found.reasoning}{ends}{text}"
    return Reply.of(text, found.tokens)


class _Filtered(Exception):
    """The endpoint's content filter removed the reply."""


class _Unfinished(Exception):
    """The judge's thought did not end within the most tokens that it may write."""


class _BudgetSpent(Exception):
    """There is no budget for asking again with more tokens."""


def _shorter(limit: int) -> int:
    return max(WORDS_TOKENS, limit // 2)


def _limit(request: Mapping[str, Any]) -> int:
    return int(request.get(LIMIT) or request.get(THINKING_LIMIT) or 0)


class JudgeRequest:
    """The arguments of a request, without those that the endpoint has refused.

    Not thread-safe: used from one event loop. Requests made before a refusal may still be under way.

    Args:
        model: the judge's name at the endpoint.
        max_tokens: of a reply; None: as few as its replies need.
        extra: further fields of every request, the user's.
        neutral: sampling settings that are sent so that no default of the server takes part.
    """

    def __init__(
        self, model: str, max_tokens: int | None, extra: Mapping[str, Any], neutral: Mapping[str, float]
    ) -> None:
        self._no_room: dict[int, int] = {}  # length of a reply -> the shortest prompt beside which it did not fit
        self._always: dict[str, Any] = {"model": model, "seed": 0}
        self._given, self._extra, self._neutral = max_tokens, dict(extra), dict(neutral)
        self._while_taken: dict[str, Any] = {
            LIMIT: max_tokens or MAX_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
        }

    def of(self, prompt: str) -> dict[str, Any]:
        """Arguments of `ChatClient.complete`."""
        request = {**self._always, "messages": [{"role": "user", "content": prompt}], **self._while_taken}
        name = LIMIT if LIMIT in request else THINKING_LIMIT
        while request[name] > WORDS_TOKENS and len(prompt) >= self._no_room.get(request[name], len(prompt) + 1):
            request[name] = _shorter(request[name])
        body = {**self._neutral, **self._extra}
        return request | ({"extra_body": body} if body else {})

    def ask_for_more(self, sent: Mapping[str, Any], prompt: str, thinks: bool) -> bool:
        """Allow longer replies than in `sent`: some words, or thoughts. Returns whether there is more to allow."""
        now = _limit(self._while_taken)
        more = THINKING_TOKENS if thinks or now >= WORDS_TOKENS else WORDS_TOKENS
        if self._given is None and now < more and now <= _limit(sent):  # else another reply has shown it meanwhile
            self._while_taken[LIMIT if LIMIT in self._while_taken else THINKING_LIMIT] = more
            if more > WORDS_TOKENS:  # 20 alternatives for each token of a thought would be megabytes
                self._while_taken.pop("logprobs", None)
                self._while_taken.pop("top_logprobs", None)
            what = "thinks first" if thinks else "writes words around its number"
            log.info("the judge %s: its replies may take %d tokens", what, more)
        return _limit(self.of(prompt)) > _limit(sent)

    def learn(self, error: CallError, sent: Mapping[str, Any], prompt: str) -> bool:
        """Leave out what the endpoint refused in `sent`, or shorten the reply where its context has no room for it.

        Returns whether there was such a thing: then ask again.
        """
        if error.too_long or error.no_room:
            return error.no_room and self._shorten(_limit(sent), prompt, str(error))
        if error.status not in (400, 403, 422):
            return False
        text = str(error)
        if "logprob" in text.lower() and "logprobs" in sent:
            self._leave_out("logprobs", "gives no log-probabilities; reading the number it says")
            self._while_taken.pop("top_logprobs", None)
        elif THINKING_LIMIT in text and LIMIT in sent:
            most = self._given or THINKING_TOKENS
            self._leave_out(LIMIT, f"takes only {THINKING_LIMIT}; it is {most}, as reasoning counts")
            self._while_taken[THINKING_LIMIT] = most
        elif "temperature" in text and _REFUSED.search(text) and "temperature" in sent:
            self._leave_out("temperature", "takes no temperature; it may judge an answer differently each time")
        elif self._refuses_neutral(text, sent):
            if self._neutral:
                log.warning("the judge's endpoint takes no %s; its own defaults apply", ", ".join(self._neutral))
            self._neutral = {}
        else:
            return False
        return True

    def _shorten(self, limit: int, prompt: str, said: str) -> bool:
        """Ask for a shorter reply to prompts of this length; False where the prompt itself is too long."""
        if limit <= WORDS_TOKENS:
            return False
        if limit not in self._no_room:
            log.warning(
                "the judge's server has no room for a prompt and a reply of %d tokens: such replies may take %d (%s)",
                limit, _shorter(limit), said,
            )  # fmt: skip
        self._no_room[limit] = min(len(prompt), self._no_room.get(limit, len(prompt)))
        return True

    @staticmethod
    def _refuses_neutral(text: str, sent: Mapping[str, Any]) -> bool:
        named = any(name in text for name in NEUTRAL_SAMPLING)
        return named and any(name in sent.get("extra_body", {}) for name in NEUTRAL_SAMPLING)

    def _leave_out(self, name: str, why: str) -> None:
        if self._while_taken.pop(name, None) is not None:
            log.warning("the judge's endpoint %s", why)


def missing_judge_key(settings: JudgeRecipe, environment: Mapping[str, str] = os.environ) -> str | None:
    """Name of the missing API-key variable, or None. An endpoint with a base_url is taken to need no key."""
    own = settings.base_url or environment.get("OPENAI_BASE_URL")
    return None if own or environment.get(settings.api_key_env) else settings.api_key_env
