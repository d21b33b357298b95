"""Written answers as tokens: behind their question, and alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ema_scale.core.errors import UserError
from ema_scale.data.tokens import Encoder

Messages = Sequence[Mapping[str, Any]]
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class AnswerTokens:
    """A conversation that ends with an answer. Tokens from `start` on are scored: the answer and its end of turn."""

    ids: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.start


def encode_answers(
    encoder: Encoder,
    messages: Messages,
    answers: Sequence[str],
    where: str,
    max_length: int | None = None,
    *,
    turn: Mapping[str, Any] = _NOTHING,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[AnswerTokens]:
    """The answers behind one conversation, in order.

    Args:
        encoder: of the model.
        messages: the turns in front of the answers.
        answers: texts of the assistant.
        where: the question, for messages.
        max_length: tokens that a conversation may have.
        turn: what the assistant's turn holds besides its text: reasoning, tool calls.
        tools: JSON schemas of functions that the assistant may call.

    Raises UserError if the template does not show an answer whole and at the end, or if one does not fit into
    `max_length` tokens.
    """
    front = [{**m, "learn": False} if m["role"] == "assistant" else m for m in messages]  # these are not scored
    rows: list[Any] = [([*front, {**turn, "role": "assistant", "content": answer}], tools) for answer in answers]
    found = []
    for answer, encoded in zip(answers, encoder.encode_all(rows), strict=True):
        if isinstance(encoded, UserError):
            raise UserError(f"{where}: {encoded}")
        scored = np.flatnonzero(encoded.assistant_mask)
        if not len(scored) or scored[-1] - scored[0] + 1 != len(scored):
            raise UserError(f"{where}: the chat template does not show the answer {answer!r:.60} as it is")
        end = int(scored[-1]) + 1
        if max_length is not None and end > max_length:
            raise UserError(
                f"{where}: question and answer {answer!r:.60} have {end} tokens; the model takes {max_length}"
            )
        found.append(AnswerTokens(tuple(int(i) for i in encoded.input_ids[:end]), int(scored[0])))
    return found
