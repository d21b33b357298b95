"""A conversation as the tokens that both samplers are given, and their tokens as text: the same for both."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from datetime import date as Date
from typing import TYPE_CHECKING, Any

from ema_scale.choices.tokens import AnswerTokens, encode_answers
from ema_scale.core.errors import UserError
from ema_scale.core.thoughts import CLOSE, OPEN, opened_by, pairs_in
from ema_scale.data.templates import ChatTemplate
from ema_scale.data.tokens import Encoder, load_tokenizer
from ema_scale.inference.base import ScoreRequest
from ema_scale.inference.thoughts import join_channels

if TYPE_CHECKING:
    from ema_scale.config.sections import ModelRecipe


class Prompts:
    """The tokenizer of a model with its chat template, as training uses it.

    A system prompt goes into the user turn where the template takes none; special tokens in a question's text
    are broken up. stops: every token that ends an answer.
    """

    def __init__(self, model: ModelRecipe) -> None:
        self.tokenizer: Any = _tokenizer(model)
        self._encoder = Encoder(self.tokenizer)
        self._dated: dict[str, Encoder] = {}
        self._has_channels = "<|channel|>" in self.tokenizer.get_added_vocab()
        # Some models mark thoughts by special tokens, which an answer's text goes without.
        self._thoughts = pairs_in(f"{self.tokenizer.chat_template}{''.join(self.tokenizer.get_added_vocab())}")
        self._thought_tokens = {
            number: token.content
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if any(token.content in tag for pair in self._thoughts for tag in pair)
        }
        self.stops = _stop_token_ids(self.tokenizer, self._encoder.end_of_turn, model)

    def ids(self, messages: Sequence[dict[str, str]], date: str = "") -> list[int]:
        """Token ids of the conversation up to where the assistant begins to speak.

        date: what a chat template that writes the date is told, YYYY-MM-DD; default: today.
        """
        return self._encoder_of(date).prompt_ids(messages)  # type: ignore[arg-type]

    def _encoder_of(self, date: str) -> Encoder:
        if not date or self._encoder.template.written_date in ("", date):
            return self._encoder
        if date not in self._dated:
            self._dated[date] = Encoder(self.tokenizer, Date.fromisoformat(date))
        return self._dated[date]

    def answers(self, request: ScoreRequest, max_length: int | None) -> tuple[list[AnswerTokens], list[AnswerTokens]]:
        """The answers of a request behind their question, and alone ([] if that is not asked for).

        Raises UserError for an answer that does not fit into `max_length` tokens.
        """
        encode = functools.partial(
            encode_answers,
            self._encoder_of(request.date),
            answers=request.answers,
            where=request.where,
            max_length=max_length,
            turn=request.turn,
            tools=request.tools,
        )
        return encode(request.messages), [] if request.alone is None else encode(request.alone)

    def opening(self, prompt: Sequence[int]) -> str:
        """`<think>` if the template has begun the model's reasoning at the end of the prompt, else nothing.

        Put before an answer's text, it tells reasoning that never ended from an answer.
        """
        tail = str(self.tokenizer.decode(list(prompt[-32:]), skip_special_tokens=False))
        return OPEN if opened_by(tail) else ""

    def text(self, token_ids: Sequence[int]) -> str:
        """An answer's text without special tokens; thoughts, whatever marks them, in <think>...</think>."""
        if self._has_channels:
            text = str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))
            if (joined := join_channels(text)) != text:
                return joined
        text = "".join(self._pieces(token_ids))
        for opening, closing in self._thoughts:
            text = text.replace(opening, OPEN, 1).replace(closing, CLOSE, 1)
        return text

    def _pieces(self, token_ids: Sequence[int]) -> Iterator[str]:
        start = 0
        for place, token in enumerate(token_ids):
            if token in self._thought_tokens:
                yield str(self.tokenizer.decode(list(token_ids[start:place]), skip_special_tokens=True))
                yield self._thought_tokens[token]
                start = place + 1
        yield str(self.tokenizer.decode(list(token_ids[start:]), skip_special_tokens=True))


def _tokenizer(model: ModelRecipe) -> Any:
    return load_tokenizer(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        chat_template=model.chat_template,
    )


def writes_date(model: ModelRecipe) -> bool:
    """Whether the model's chat template writes the date. False if there is no tokenizer to ask."""
    try:
        return bool(ChatTemplate(_tokenizer(model)).written_date)
    except UserError:  # sampling, where it is still needed, says so
        return False


def load_config(model: ModelRecipe) -> Any:
    """The checkpoint's config. Raises UserError if there is none."""
    from transformers import AutoConfig

    from ema_scale.models.load import model_problems

    with model_problems(model.path):
        return AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def _stop_token_ids(tokenizer: Any, end_of_turn: str, model: ModelRecipe) -> list[int]:
    """The template's end of turn, the tokenizer's end of text, and the checkpoint's own list."""
    from transformers import GenerationConfig

    where: dict[str, Any] = {"revision": model.revision}
    try:
        own = GenerationConfig.from_pretrained(model.path, **where).eos_token_id
    except OSError:  # the checkpoint has no generation_config.json
        own = getattr(load_config(model), "eos_token_id", None)
    ids = {own} if isinstance(own, int) else set(own or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if end_of_turn:
        ids.add(tokenizer.convert_tokens_to_ids(end_of_turn))
    return sorted(int(i) for i in ids)
