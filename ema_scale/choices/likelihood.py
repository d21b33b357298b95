"""Log-likelihoods of many answers at once. What answers have in common, their questions, runs through the model once.

Rows that begin with the same tokens share the keys and values of these tokens: first what all rows share (a system
prompt), then each question, then its answers, in batches of similar length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ema_scale.choices.tokens import AnswerTokens
from ema_scale.core.batching import batch_by_length
from ema_scale.models.head import Head, head_logits
from ema_scale.models.kv_cache import empty_cache, keeps_plain_layers, picked

log = logging.getLogger(__name__)

IGNORED = -100
# Tokens per batch, with padding. On a CPU more of them leave the caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_LOGITS = 1 << 26  # that exist at once


@dataclass(frozen=True)
class Inputs:
    """One batch for the model.

    ids: int64 [B, T].
    targets: int64 [B, T], the token that follows each one, or IGNORED.
    positions: int64 [B, T].
    mask: int64 [B, P + T], 0 on padding; P is the length of the cache. None: rows are padded on the right alone.
    cache: keys and values of P tokens in front, which the model extends. None: nothing is in front or kept.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor | None = None
    cache: Any = None

    def arguments(self) -> dict[str, Any]:
        """What transformers' models take, apart from `targets`."""
        given: dict[str, Any] = {"input_ids": self.ids, "use_cache": self.cache is not None}
        if self.cache is not None:
            given |= {"past_key_values": self.cache, "position_ids": self.positions}
        return given if self.mask is None else given | {"attention_mask": self.mask}


# float32 [B, T]: log p of each target, 0 where it is IGNORED.
Forward = Callable[[Inputs], Tensor]


def target_likelihoods(states: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Log p of each target, float32 [B, T], 0 where it is IGNORED; softmax in float32 over the full vocabulary.

    states: last hidden states [B, T, H].
    targets: [B, T].
    """
    wanted = targets != IGNORED
    found = torch.zeros(targets.shape, dtype=torch.float32, device=states.device)
    picked, next_tokens = states[wanted], targets[wanted]
    chunk = max(1, _LOGITS // head.weight.shape[0])
    parts = []
    for state, target in zip(picked.split(chunk), next_tokens.split(chunk), strict=True):
        logits = head_logits(state, head, torch.float32)
        parts.append(logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, 1))
    if parts:
        found[wanted] = torch.cat(parts)
    return found


class Scorer:
    """Scores answers by one model. The first question is also scored without sharing, and a model that gives another
    answer then is never shared.

    forward: the model.
    config: its config.
    device: where its inputs go.
    batch_tokens: most tokens per batch; default: that of the device.
    share: False: every row runs alone through the model.
    """

    def __init__(
        self, forward: Forward, config: Any, device: torch.device, batch_tokens: int | None = None, share: bool = True
    ) -> None:
        self._forward, self._device = forward, device
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
        self._share = share and keeps_plain_layers(config)
        self._window = getattr(config.get_text_config(), "sliding_window", None)
        self._checked = False

    @torch.no_grad()
    def totals(self, rows: Sequence[AnswerTokens]) -> Iterator[tuple[int, float]]:
        """(index, sum of the log-likelihoods of its scored tokens in nats) of every row, as they are done."""
        if not rows:
            return
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            # The last token in front of the answer stays with it: what follows it is the first that is scored.
            by_prompt.setdefault(row.ids[: row.start - 1], []).append(i)
        longest = max(len(row.ids) for row in rows)
        if self._share and not self._checked:
            self._share = self._agrees(rows, next(iter(by_prompt.values())))
        too_long = self._window is not None and 2 * longest > self._window  # padding takes part of the window
        if not self._share or too_long or () in by_prompt:
            yield from self._alone(rows, range(len(rows)))
            return
        yield from self._shared(rows, by_prompt)

    def _agrees(self, rows: Sequence[AnswerTokens], first: Sequence[int]) -> bool:
        """Whether one question has the same likelihoods with and without sharing."""
        self._checked = True
        few = [rows[i] for i in first[:2]]
        if few[0].start < 2:
            return True
        try:
            shared = dict(self._shared(few, {few[0].ids[: few[0].start - 1]: list(range(len(few)))}))
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            log.warning("this model cannot share prefixes between answers (%s); scoring takes longer", error)
            return False
        apart = max(abs(total - shared[i]) / few[i].count for i, total in self._alone(few, range(len(few))))
        if apart > 0.1:  # half precision differs by about 0.01
            log.warning(
                "this model cannot share prefixes between answers (%.2g nats apart); scoring takes longer", apart
            )
        return apart <= 0.1

    def _alone(self, rows: Sequence[AnswerTokens], indices: Sequence[int]) -> Iterator[tuple[int, float]]:
        for batch in batch_by_length(indices, lambda i: len(rows[i].ids), self._batch_tokens):
            ids, targets, lengths = self._padded([rows[i].ids for i in batch], [rows[i].start for i in batch])
            positions = torch.arange(ids.shape[1], device=self._device).expand_as(ids)
            yield from self._sums(batch, Inputs(ids, targets, positions))

    def _shared(
        self, rows: Sequence[AnswerTokens], by_prompt: dict[tuple[int, ...], list[int]]
    ) -> Iterator[tuple[int, float]]:
        prompts = list(by_prompt)
        root = prompts[0][: _common(prompts)]
        # A prompt that is all root would have no tokens of its own.
        root = root[: min(len(root), min(map(len, prompts)) - 1)]
        nothing = torch.ones(1, 0, dtype=torch.long, device=self._device)
        start = self._extended(empty_cache(), nothing, [root]) if root else None
        for some in batch_by_length(prompts, len, self._batch_tokens):
            cache, mask = empty_cache(), torch.ones(len(some), 0, dtype=torch.long, device=self._device)
            if start is not None:
                everyone = torch.zeros(len(some), dtype=torch.long, device=self._device)
                cache, mask = picked(start[0], everyone), start[1][everyone]
            cache, mask = self._extended(cache, mask, [prompt[len(root) :] for prompt in some])
            answers = [(i, place) for place, prompt in enumerate(some) for i in by_prompt[prompt]]
            for batch in batch_by_length(answers, lambda item: rows[item[0]].count + 1, self._batch_tokens):
                places = torch.tensor([place for _, place in batch], device=self._device)
                those = [rows[i] for i, _ in batch]
                ids, targets, lengths = self._padded([row.ids[row.start - 1 :] for row in those], [1] * len(those))
                yield from self._sums(
                    [i for i, _ in batch], self._behind(picked(cache, places), mask[places], ids, targets, lengths)
                )

    def _extended(self, cache: Any, mask: Tensor, tails: Sequence[Sequence[int]]) -> tuple[Any, Tensor]:
        """The cache with these tokens behind it, and its mask."""
        ids, targets, lengths = self._padded(tails, None)
        inputs = self._behind(cache, mask, ids, targets, lengths)
        self._forward(inputs)
        assert inputs.mask is not None
        return inputs.cache, inputs.mask

    def _behind(self, cache: Any, mask: Tensor, ids: Tensor, targets: Tensor, lengths: Tensor) -> Inputs:
        places = torch.arange(ids.shape[1], device=self._device)
        positions = mask.sum(1, keepdim=True) + places
        own = (places < lengths[:, None]).long()
        return Inputs(ids, targets, positions, torch.cat([mask, own], 1), cache)

    def _padded(self, rows: Sequence[Sequence[int]], starts: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
        """ids and targets [B, T], padded on the right, and the rows' lengths. starts: the first token that is scored;
        None: no token is."""
        lengths = [len(row) for row in rows]
        width = max(lengths)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        targets = torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            if starts is not None:
                targets[i, starts[i] - 1 : len(row) - 1] = ids[i, starts[i] : len(row)]
        return ids.to(self._device), targets.to(self._device), torch.tensor(lengths, device=self._device)

    def _sums(self, batch: Sequence[int], inputs: Inputs) -> list[tuple[int, float]]:
        sums = self._forward(inputs).double().sum(1).tolist()
        return list(zip(batch, sums, strict=True))


def _common(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
