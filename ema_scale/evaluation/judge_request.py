"""A judging prompt as a request that the judge's endpoint takes: what it refuses is left out from then on.

Models that think first take no max_tokens but max_completion_tokens, which counts their thoughts, too, and no
temperature; many endpoints give no log-probabilities.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from ema_scale.evaluation.judge_scores import MAX_TOKENS, TOP_LOGPROBS

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
