"""The reference computed once and read from disk: it depends on the row alone, so no epoch and no run needs it again.

A step then runs the policy alone. What is kept are hidden states, in their own dtype: the frozen head makes the exact
distributions of them, at 1/50th of their size or less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ema_scale.core.errors import UserError
from ema_scale.models.layout import ModelLayout
from ema_scale.reference.adapter_off import AdapterOff
from ema_scale.reference.base import HiddenStates, Keep, Reference
from ema_scale.reference.hidden_state_store import HiddenStateStore, row_key

LAST = "last"


@dataclass(frozen=True)
class SequenceKeys:
    """Where every text of a batch is: (row of the batch, positions of its tokens, key). Not a list, so that nobody
    moves the positions to a GPU."""

    places: list[tuple[int, Tensor, str]]

    @classmethod
    def of(cls, batch: dict[str, Any]) -> SequenceKeys:
        """On a GPU this waits for it."""
        return cls(list(segments(batch)))


class Cached(Reference):
    """Reads the reference's last states, and those after `layers`, from the folder of its fingerprint.

    `filling.fill` puts them there. Drift readings of other layers, and rows that are only evaluated, are computed as
    `AdapterOff` does.
    """

    name: ClassVar[str] = "cached"

    def __init__(self, anatomy: ModelLayout, folder: Path, layers: Sequence[int] = ()) -> None:
        super().__init__(anatomy)
        self.folder = folder
        self.layers = tuple(sorted(set(layers)))
        self.shelves = {kind: HiddenStateStore(folder / kind) for kind in (LAST, *(f"layer_{k}" for k in self.layers))}
        self.texts: SequenceKeys | None = None  # of the next batch, if somebody has looked already
        self._plain = AdapterOff(anatomy)
        self._plain.watch = self.watch

    def streams(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int] = (),
        *,
        reference: bool = True,
        keep: Keep | None = None,
    ) -> HiddenStates:
        texts, self.texts = self.texts, None
        # Every process decides alike: a step's layers are the same on all, and so is what is trained on.
        if not reference or not self.anatomy.core.training or not set(layers) <= set(self.layers):
            return self._plain.streams(inputs, layers, reference=reference, keep=keep)
        with self.timed():
            places = (texts or SequenceKeys.of(inputs)).places
        states = self.policy(inputs, layers, lambda k, _: self._read(f"layer_{k}", places, inputs["input_ids"]), keep)
        states.reference = self._read(LAST, places, inputs["input_ids"])
        return states

    def compute(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What the shelves hold, of one batch: kind -> states [B, T, H]."""
        seen: dict[int, Tensor] = {}
        last = self._plain.reference_alone(inputs, self.layers, seen)
        return {LAST: last, **{f"layer_{k}": seen[k] for k in self.layers}}

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those rows of which some state is not there."""
        return [key for key in keys if not all(key in shelf for shelf in self.shelves.values())]

    def _read(self, kind: str, places: list[tuple[int, Tensor, str]], ids: Tensor) -> Tensor:
        """States [B, T, H] on the device of `ids`, 0 on padding."""
        with self.timed():
            return self._gather(kind, places, ids)

    def _gather(self, kind: str, places: list[tuple[int, Tensor, str]], ids: Tensor) -> Tensor:
        shelf = self.shelves[kind]
        try:
            rows = [(row, at, shelf.read(key)) for row, at, key in places]
        except KeyError:
            raise UserError(
                f"{self.folder}: holds no states of a row that is trained on; use reference: adapter_off for rows "
                "that change from step to step"
            ) from None
        states = rows[0][2]
        batch = torch.zeros(*ids.shape, states.shape[-1], dtype=states.dtype, pin_memory=ids.is_cuda)
        for row, at, states in rows:
            batch[row, at] = states
        return batch.to(ids.device, non_blocking=True)


def segments(inputs: dict[str, Any]) -> Iterator[tuple[int, Tensor, str]]:
    """(row of the batch, positions of its tokens, key) of every text in a batch; position ids that start again at 0
    tell packed texts apart."""
    ids = inputs["input_ids"].cpu()
    mask, positions = (None if inputs.get(k) is None else inputs[k].cpu() for k in ("attention_mask", "position_ids"))
    for row in range(len(ids)):
        real = torch.arange(ids.shape[1]) if mask is None else mask[row].nonzero().squeeze(1)
        starts = [0]
        if positions is not None:
            starts += [i for i in (positions[row, real] == 0).nonzero().squeeze(1).tolist() if i > 0]
        for start, end in zip(starts, [*starts[1:], len(real)], strict=True):
            if end > start:
                at = real[start:end]
                yield row, at, row_key(ids[row, at].tolist())
