"""One number per row and model, kept in a file from which a killed run continues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ema_scale.core.io import append_jsonl, read_jsonl


class KeptValues:
    """The numbers of a JSONL file, by model and row, and those that are added to it. NaN stands as null in the file.

    One line holds a whole batch, {"reader": model, "rows": {row: number}}. A kill may tear the last line. Then that
    batch is read again as a whole: padded as before, its rows get the same numbers to the last digit.

    path: None: nothing is kept beyond the process. The caller holds the folder's lock.
    Raises UserError for a file that holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._values: dict[tuple[str, str], float] = {}
        for line in read_jsonl(path, repair=True) if path is not None else ():
            if isinstance(rows := line.get("rows"), dict):
                found = {key: math.nan if value is None else float(value) for key, value in rows.items()}
                self._values |= {(line.get("reader", ""), key): value for key, value in found.items()}

    def __contains__(self, place: tuple[str, str]) -> bool:
        return place in self._values

    def __getitem__(self, place: tuple[str, str]) -> float:
        return self._values[place]

    def add(self, reader: str, rows: Sequence[str], values: Sequence[float]) -> None:
        """The numbers of one batch. reader: a digest of the model, and of what else decides the number."""
        self._values |= {(reader, row): value for row, value in zip(rows, values, strict=True)}
        if self.path is not None:
            finite = {row: value if math.isfinite(value) else None for row, value in zip(rows, values, strict=True)}
            append_jsonl(self.path, [{"reader": reader, "rows": finite}])
