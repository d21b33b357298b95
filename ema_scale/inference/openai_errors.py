"""What OpenAI-compatible endpoints say, however they say it: a reply, or why there is none."""

from __future__ import annotations

import re
from typing import Any

CONTENT_FILTER = "content_filter"


def first_choice(reply: Any) -> Any:
    """The first choice of a chat completion. Raises ValueError if it is none: a page, an error with status 200, ..."""
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise ValueError("the endpoint's reply is not a chat completion")
    return choices[0]


def is_context_overflow(error: Exception) -> bool:
    """OpenAI's and vLLM's ways of saying that a prompt does not fit into the model's context."""
    return bool(re.search(r"context[ _]length|maximum (context|model)|too (long|many tokens)", str(error), re.I))


def is_content_filtered(error: Exception) -> bool:
    """OpenAI's, Azure's and proxies' ways of saying that a prompt may not be answered, now or ever."""
    code, text = getattr(error, "code", None), str(error)
    if code in (CONTENT_FILTER, "content_policy_violation"):
        return True
    said = r"content management policy|violating our usage policy|ContentPolicyViolation|input was flagged"
    return bool(re.search(said, text))
