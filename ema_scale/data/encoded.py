"""A conversation as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

COUNTS = ("length", "folded", "reasoning_dropped", "no_end", "unlike_prompt", "straddled", "unknown")


@dataclass(frozen=True)
class Encoded:
    """One conversation.

    input_ids: int32 [T].
    assistant_mask: bool [T], True on what the assistant wrote, end-of-turn tokens included.
    template_mask: bool [T], True on what the chat template wrote, and no message; None if that was not asked for.
    length: tokens before the cut.
    truncated: rows longer than the longest allowed length were cut.
    disarmed: the row held special tokens as text; these were broken up.
    folded: a system prompt was put into a user turn.
    reasoning_dropped: earlier turns whose reasoning the template leaves out.
    no_end: learned turns without a token that ends them.
    unlike_prompt: learned turns that begin otherwise than the generation prompt does.
    straddled: learned spans that begin or end inside a token.
    unknown: tokens that the tokenizer does not know.
    """

    input_ids: np.ndarray
    assistant_mask: np.ndarray
    truncated: bool = False
    disarmed: bool = False
    template_mask: np.ndarray | None = None
    length: int = 0
    folded: int = 0
    reasoning_dropped: int = 0
    no_end: int = 0
    unlike_prompt: int = 0
    straddled: int = 0
    unknown: int = 0
