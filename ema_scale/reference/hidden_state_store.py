"""Hidden states on disk, found by the content of their rows, in memory-mapped safetensors shards.

A shard is `<name>.safetensors` with one tensor `states` [tokens, H], and `<name>.json` with its size, its SHA-256 and
the place of each row. The JSON file is written last: without it a shard does not count. Shards are only ever added.
"""

from __future__ import annotations

import array
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.hashing import file_sha256
from ema_scale.core.io import atomic_path, atomic_write_text

log = logging.getLogger(__name__)


def row_key(tokens: Sequence[int]) -> str:
    """A row's key depends on its token ids alone, not on its place in a batch or on padding."""
    return hashlib.sha256(array.array("q", tokens).tobytes()).hexdigest()[:32]


@dataclass(frozen=True)
class RowKeys:
    """The rows of a batch: (sequence, positions of the row's tokens in it, key).

    A class of its own, not a list: transformers moves lists of tensors to the GPU.
    """

    places: list[tuple[int, Tensor, str]]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> RowKeys:
        """batch: input_ids [B, T] and, if given, attention_mask and position_ids. Waits for a GPU."""
        return cls(list(_rows_of(batch)))


def _rows_of(batch: Mapping[str, Any]) -> Iterator[tuple[int, Tensor, str]]:
    ids = batch["input_ids"].cpu()
    mask, positions = (None if batch.get(k) is None else batch[k].cpu() for k in ("attention_mask", "position_ids"))
    for sequence in range(len(ids)):
        real = torch.arange(ids.shape[1]) if mask is None else mask[sequence].nonzero().squeeze(1)
        starts = [0]
        if positions is not None:  # a position of 0 begins the next packed row
            starts += [i for i in (positions[sequence, real] == 0).nonzero().squeeze(1).tolist() if i > 0]
        for start, end in zip(starts, [*starts[1:], len(real)], strict=True):
            if end > start:
                at = real[start:end]
                yield sequence, at, row_key(ids[sequence, at].tolist())


class HiddenStateStore:
    """States of one kind (the last ones, or those after layer k) of one reference, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[str, int, int]] = {}  # row -> shard, first token, tokens
        self._open: dict[str, Any] = {}
        self.load()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def load(self) -> None:
        """Read the folder again."""
        self._places, self._open = {}, {}
        for path in sorted(self.folder.glob("*.json")):
            entry = _entry(path)
            data = path.with_suffix(".safetensors")
            if entry is not None and data.exists() and data.stat().st_size == entry["bytes"]:
                for key, (start, tokens) in entry["rows"].items():
                    self._places[key] = (path.stem, start, tokens)

    def clean(self, keys: Iterable[str]) -> None:
        """Remove what a killed run left, and every damaged shard that holds a row of `keys`.

        Only one process at a time may clean or add.
        """
        wanted = {self._places[key][0] for key in keys if key in self._places}
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for data in self.folder.glob("*.safetensors"):
            entry = _entry(data.with_suffix(".json"))
            whole = entry is not None and data.stat().st_size == entry["bytes"]
            if whole and (data.stem not in wanted or file_sha256(data) == entry["sha256"]):  # type: ignore[index]
                continue
            if entry is not None:
                log.warning("%s is damaged; its rows are computed again", data)
            data.with_suffix(".json").unlink(missing_ok=True)
            data.unlink()
        self.load()

    def add(self, states: Mapping[str, Tensor]) -> None:
        """Write one shard of rows: key -> states [tokens, H] on the CPU."""
        name = hashlib.sha256("".join(states).encode()).hexdigest()[:16]
        data, start, rows = self.folder / f"{name}.safetensors", 0, {}
        for key, tensor in states.items():
            rows[key] = (start, len(tensor))
            start += len(tensor)
        with atomic_path(data) as temporary:
            save_file({"states": torch.cat(list(states.values()))}, temporary)
            entry = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary), "rows": rows}
        atomic_write_text(data.with_suffix(".json"), json.dumps(entry))
        for key, (first, tokens) in rows.items():
            self._places[key] = (name, first, tokens)

    def read(self, key: str) -> Tensor:
        """States [tokens, H] of a row, from the mapped file. Raises KeyError if the row is not there."""
        name, start, tokens = self._places[key]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / f"{name}.safetensors", "pt").get_slice("states")
        return self._open[name][start : start + tokens]


def _entry(path: Path) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = read_json(path)
        return entry if {"bytes", "sha256", "rows"} <= entry.keys() else None
    except (UserError, AttributeError):
        return None
