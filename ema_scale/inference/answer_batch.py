"""A batch of answers by transformers' `generate`. A prompt runs through the model once for all of its answers, and
answers that have ended make room for others while the rest go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ema_scale.core.errors import UserError
from ema_scale.inference.base import NEUTRAL_SAMPLING, SampleRequest
from ema_scale.inference.seeded_sampling import SeededSampling
from ema_scale.models.kv_cache import empty_cache, joined, keeps_plain_layers, picked
from ema_scale.models.layout import ModelLayout

# A batch is left when so many of its answers have ended: it is filled up if others wait, and made smaller if not.
ENDED_TO_FILL, ENDED_TO_SHRINK = 1 / 4, 1 / 2


@dataclass(eq=False)
class Answer:
    """One answer that is being drawn.

    Args:
        limit: most tokens that it may have.
        generator: its own random stream, from when it joins a batch until it has ended.
        tokens: what is drawn, the stop token included.
        finish_reason: "stop" or "length"; "": it has not ended.
    """

    request: SampleRequest
    index: int
    prompt: tuple[int, ...]
    limit: int
    generator: torch.Generator | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def extend(self, drawn: Sequence[int], stops: Sequence[int]) -> None:
        """Take what a batch drew for it, up to its end."""
        for token in drawn:
            self.tokens.append(token)
            if token in stops:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.limit:
                self.finish_reason = "length"
            if self.finish_reason:
                self.generator = None
                return


@dataclass
class _Batch:
    """Rows padded on the left.

    Args:
        ids: int64 [B, T].
        mask: int64 [B, T], 0 on padding.
        cache: keys and values of T - 1 tokens; None: nothing is kept from one call to the next.
    """

    answers: list[Answer]
    ids: Tensor
    mask: Tensor
    cache: Any

    def picked(self, rows: Sequence[int], answers: list[Answer]) -> _Batch:
        """The chosen rows, without padding that all of them have. answers: one per row."""
        chosen = torch.tensor(rows, device=self.ids.device)
        start = int(self.mask[chosen].any(0).int().argmax())
        return _Batch(answers, self.ids[chosen, start:], self.mask[chosen, start:], picked(self.cache, chosen, start))

    def joined(self, other: _Batch) -> _Batch:
        width = max(self.ids.shape[1], other.ids.shape[1])
        ids, mask = (
            torch.cat([torch.nn.functional.pad(x, (width - x.shape[1], 0)) for x in pair])
            for pair in ((self.ids, other.ids), (self.mask, other.mask))
        )
        return _Batch([*self.answers, *other.answers], ids, mask, joined(self.cache, other.cache))


class _Leave(StoppingCriteria):
    """Ends each row at a stop token or its limit, and the batch when enough rows have ended."""

    def __init__(self, stops: Tensor, ends: Tensor, enough: int) -> None:
        self._stops, self._ends, self._enough = stops, ends, enough
        self._ended = torch.zeros_like(ends, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """input_ids [B, T]; returns bool [B]."""
        self._ended |= torch.isin(input_ids[:, -1], self._stops) | (input_ids.shape[1] >= self._ends)
        return torch.ones_like(self._ended) if int(self._ended.sum()) >= self._enough else self._ended


class AnswerBatches:
    """Draws answers by one model, at most `size` at once.

    Models that keep more than keys and values, and those of other people's code, run every prompt for each answer.
    """

    def __init__(self, model: Any, stops: Sequence[int], pad: int, size: int) -> None:
        self._model, self._stops, self._pad, self._size = model, stops, pad, size
        self._device = model.device
        self._backbone = _sharing_backbone(model)

    def draw(self, answers: Sequence[Answer], use_adapter: Callable[[], None]) -> Iterator[Answer]:
        """Yields each answer when it has ended. Answers to one prompt stand together.

        use_adapter: is called whenever the model is to run, since a caller may have used it between two answers.
        """
        waiting = deque(answers)
        prompts: dict[tuple[int, ...], int] = {}
        ran: _Batch | None = None  # what `prompts` are
        batch: _Batch | None = None
        while waiting or batch is not None:
            use_adapter()
            with torch.inference_mode():
                if self._backbone is None:
                    some = [waiting.popleft() for _ in range(min(self._size, len(waiting)))]
                    batch = _Batch(some, *self._padded([answer.prompt for answer in some]), None)
                while self._backbone is not None and waiting:
                    room = self._size - (len(batch.answers) if batch else 0)
                    if room <= 0:
                        break
                    if waiting[0].prompt not in prompts:
                        prompts = _places(answer.prompt for answer in islice(waiting, self._size))
                        ran = self._prefilled(list(prompts))
                    assert ran is not None
                    new: list[Answer] = []
                    while waiting and len(new) < room and waiting[0].prompt in prompts:
                        new.append(waiting.popleft())
                    added = ran.picked([prompts[answer.prompt] for answer in new], new)
                    batch = added if batch is None else batch.joined(added)
                assert batch is not None
                ended, batch = self._continued(batch, bool(waiting))
            yield from ended

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        return ids.to(self._device), mask.to(self._device)

    def _prefilled(self, prompts: Sequence[Sequence[int]]) -> _Batch:
        """The prompts, and the keys and values of all their tokens but the last."""
        assert self._backbone is not None
        ids, mask = self._padded(prompts)
        cache = empty_cache()
        before = mask[:, :-1]
        positions = (before.cumsum(1) - 1).clamp(min=0)
        self._backbone(
            input_ids=ids[:, :-1], attention_mask=before, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return _Batch([], ids, mask, cache)

    def _continued(self, batch: _Batch, others_wait: bool) -> tuple[list[Answer], _Batch | None]:
        """Draws until enough answers have ended; returns these, and the batch of the others."""
        answers, length = batch.answers, batch.ids.shape[1]
        left = [answer.limit - len(answer.tokens) for answer in answers]
        share = ENDED_TO_FILL if others_wait else ENDED_TO_SHRINK
        enough = len(answers) if batch.cache is None else max(1, int(len(answers) * share))
        ends = torch.tensor([length + more for more in left], device=self._device)
        requests = [answer.request for answer in answers]
        sampling = SeededSampling(
            [self._generator(answer) for answer in answers],
            [r.temperature for r in requests],
            [r.top_p for r in requests],
        )
        settings = GenerationConfig(
            max_new_tokens=max(left),
            do_sample=False,
            eos_token_id=list(self._stops),
            pad_token_id=self._pad,
            use_cache=True,
            repetition_penalty=NEUTRAL_SAMPLING["repetition_penalty"],
        )
        ids = self._model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampling]),
            stopping_criteria=StoppingCriteriaList(
                [_Leave(torch.tensor(self._stops, device=self._device), ends, enough)]
            ),
            **({} if batch.cache is None else {"past_key_values": batch.cache}),
        )
        for answer, drawn in zip(answers, ids[:, length:].tolist(), strict=True):
            answer.extend(drawn, self._stops)
        ended = [answer for answer in answers if answer.finish_reason]
        rest = [place for place, answer in enumerate(answers) if not answer.finish_reason]
        if not rest:
            return ended, None
        mask = torch.cat([batch.mask, torch.ones_like(ids[:, length:])], 1)
        return ended, _Batch([], ids, mask, batch.cache).picked(rest, [answers[place] for place in rest])

    def _generator(self, answer: Answer) -> torch.Generator:
        if answer.generator is None:
            answer.generator = torch.Generator(self._device).manual_seed(answer.request.seed + answer.index)
        return answer.generator


def _places(prompts: Iterator[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    return {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}


def _sharing_backbone(model: Any) -> Any:
    """What runs a prompt ahead; None where its keys and values would not be all that answers need."""
    try:
        layout = ModelLayout.of(model, adapters=False)
    except UserError:
        return None
    core = layout.core
    if core.is_remote_code() or not core._supports_default_dynamic_cache() or not keeps_plain_layers(core.config):
        return None
    return layout.backbone
