"""Encoded rows as a `datasets.Dataset`: in memory, or for many rows in a file that all processes of a node share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ema_scale.core.io import atomic_path, atomic_write_json
from ema_scale.data.encoded import Encoded

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


def table_of(kept: Sequence[tuple[Encoded, str]], template: bool) -> Any:
    """Columns input_ids, labels, length, tag and, if asked for, template, of (row, tag).

    Arrays go into Arrow as they are: Python's lists would take ten times the memory.
    """
    import pyarrow

    lengths = np.array([len(encoded.input_ids) for encoded, _ in kept], dtype=np.int64)
    ids = np.concatenate([encoded.input_ids for encoded, _ in kept])
    learned = np.concatenate([encoded.assistant_mask for encoded, _ in kept])
    flat = {"input_ids": ids, "labels": np.where(learned, ids, np.int32(-100))}
    if template:
        flat["template"] = np.concatenate([encoded.template_mask for encoded, _ in kept]).astype(np.int8)
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]), pyarrow.int64())
    lists = {name: pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(values)) for name, values in flat.items()}
    rest = {"length": pyarrow.array(lengths), "tag": pyarrow.array([tag for _, tag in kept], pyarrow.string())}
    columns = lists | rest
    order = ["input_ids", "labels", "length", "tag", *(["template"] if template else [])]
    return pyarrow.table({name: columns[name] for name in order})


def dataset_of(tables: Iterable[Any], name: str) -> Dataset:
    """The dataset of some tables. name: stands for their content; without it `datasets` pickles them all for one."""
    import pyarrow
    from datasets import Dataset

    return Dataset(pyarrow.concat_tables(tables), fingerprint=name[:16])


class DatasetFile:
    """A dataset in an Arrow file, which is mapped into memory, not read, and the facts about it in JSON beside it.

    path: its name stands for its content.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._facts = path, path.with_suffix(".json")

    def open(self) -> tuple[Dataset, dict[str, Any]] | None:
        """(dataset, facts), or None if it is not there or is not whole."""
        from datasets import Dataset

        if not self._facts.is_file():
            return None
        try:
            facts = json.loads(self._facts.read_bytes())
            dataset = Dataset.from_file(str(self.path))
            if len(dataset) != facts["rows"]:
                raise ValueError(f"{len(dataset)} rows, expected {facts['rows']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); its rows are tokenized again", self.path, error)
            return None
        with contextlib.suppress(OSError):  # not every disk notes when a file was read
            os.utime(self._facts)
        dataset._fingerprint = self.path.stem[:16]
        return dataset, facts

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Any], None]]:
        """Gives what writes a table. The file is there when the block ends well; it counts when it has `facts`."""
        import pyarrow

        writer: Any = None

        def write(table: Any) -> None:
            nonlocal writer
            writer = writer or pyarrow.ipc.new_stream(str(temporary), table.schema)
            writer.write_table(table)

        with atomic_path(self.path) as temporary:
            self._facts.unlink(missing_ok=True)
            try:
                yield write
            finally:
                if writer is not None:
                    writer.close()

    def write_facts(self, facts: dict[str, Any]) -> None:
        """facts: with `rows`."""
        atomic_write_json(self._facts, facts)


def content_name(parts: Iterable[str]) -> str:
    """32 hex digits that stand for some texts in their order."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode())
        made.update(b"\0")
    return made.hexdigest()[:32]
