"""The reference computed once and read from disk: it depends on the row alone, so no epoch and no run needs it again.

A step then runs the policy alone. The cache holds hidden states in their own dtype, at 1/50th of the size of the
distributions or less: the frozen head makes the exact distributions from them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ema_scale.core.errors import UserError
from ema_scale.models.layout import ModelLayout
from ema_scale.reference.adapter_off import AdapterOff
from ema_scale.reference.base import HiddenStates, LayerReader, Reference, wanted
from ema_scale.reference.hidden_state_store import HiddenStateStore, RowKeys

LAST = "last"


class Cached(Reference):
    """Reads the reference's last states, and those after `layers`, from the folder of its fingerprint.

    `cache_fill.fill_store` puts them there. Drift readings of other layers, and rows that are only evaluated, are
    computed as `AdapterOff` does.
    """

    name: ClassVar[str] = "cached"

    def __init__(self, layout: ModelLayout, folder: Path, layers: Sequence[int] = ()) -> None:
        super().__init__(layout)
        self.folder = folder
        self.layers = tuple(sorted(set(layers)))
        self.stores = {kind: HiddenStateStore(folder / kind) for kind in (LAST, *map(_kind, self.layers))}
        self._uncached = AdapterOff(layout)
        self._uncached.watch = self.watch

    def forward(
        self,
        inputs: dict[str, Any],
        layers: Collection[int] = (),
        *,
        run_reference: bool = True,
        reader: LayerReader | None = None,
        keys: RowKeys | None = None,
    ) -> HiddenStates:
        # The same on every process: all read the same layers at a step, and all train or evaluate.
        usable = run_reference and self.layout.core.training and set(wanted(layers, reader)) <= set(self.layers)
        if not usable:
            return self._uncached.forward(inputs, layers, run_reference=run_reference, reader=reader)
        with self.timed():
            keys = keys or RowKeys.of(inputs)
        ids = inputs["input_ids"]
        states = self.run_policy(inputs, layers, reader, lambda layer, _: self._read(_kind(layer), keys, ids))
        states.reference = self._read(LAST, keys, ids)
        return states

    def compute(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What the stores hold of one batch: kind -> states [B, T, H]."""
        states: dict[int, Tensor] = {}
        last = self._uncached.reference_alone(inputs, self.layers, states)
        return {LAST: last, **{_kind(k): states[k] for k in self.layers}}

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those rows of which some state is not in the cache."""
        return [key for key in keys if not all(key in store for store in self.stores.values())]

    def _read(self, kind: str, keys: RowKeys, ids: Tensor) -> Tensor:
        """States [B, T, H] on the device of `ids`, 0 on padding."""
        with self.timed():
            store = self.stores[kind]
            try:
                rows = [(sequence, at, store.read(key)) for sequence, at, key in keys.places]
            except KeyError:
                raise UserError(
                    f"{self.folder}: holds no states of a row that is trained on; use reference: adapter_off for rows "
                    "that change from step to step"
                ) from None
            states = rows[0][2]
            batch = torch.zeros(*ids.shape, states.shape[-1], dtype=states.dtype, pin_memory=ids.is_cuda)
            for sequence, at, states in rows:
                batch[sequence, at] = states
            return batch.to(ids.device, non_blocking=True)


def _kind(layer: int) -> str:
    return f"layer_{layer}"
