"""Tokenized conversations on disk: what one run of a study has tokenized, the others read.

A folder is one tokenizer's with one length, and a conversation in it is known by its messages alone, so that runs share
it whatever their defenses mix in, and in whatever order. Files are Parquet, only ever added, written whole, and named
by the digests of what is asked for and of their bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ema_scale.core.cache import gigabytes, keep_below
from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_bytes, file_lock
from ema_scale.data.encoded import COUNTS, Encoded
from ema_scale.data.rows import Row
from ema_scale.data.templates import ChatTemplate

log = logging.getLogger(__name__)
CHUNK_ROWS = 20_000  # rows of a file, and of what is in memory at once
MOST_GB = 100  # of all tokenized rows
LONGEST_WAIT = 6 * 3600  # seconds
# What decides tokens besides the tokenizer.
_CODE = ("encoded.py", "tokens.py", "templates.py", "marks.py", "spans.py", "tool_calls.py", "token_store.py")
_FLAGS = ("truncated", "disarmed")
_LISTS = ("input_ids", "assistant_mask", "template_mask")


def row_key(row: Row) -> str:
    """32 hex digits that stand for a conversation and its tools."""
    turns = [[m["role"], m["content"]] if len(m) == 2 else sorted(m.items()) for m in row.messages]
    text = json.dumps([turns, row.tools] if row.tools else turns, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class TokenStore:
    """Encoded conversations of one tokenizer below `root`; a folder that cannot be read or written is done without."""

    def __init__(self, root: Path, template: ChatTemplate, max_length: int | None, template_mask: bool) -> None:
        self.root, self.folder = root, root / _fingerprint(template, max_length, template_mask)
        self.datasets = root / "datasets" / self.folder.name
        self._places: dict[str, tuple[Path, int]] = {}  # key -> file and row group
        self._known, self._whole = set[Path](), set[Path]()
        self._has_grown = False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this tokenizer's rows. Processes that come later wait, and then find what this one has tokenized."""
        waited = UserError(f"{self.root}: another process has been tokenizing for {LONGEST_WAIT // 3600} hours")
        with contextlib.ExitStack() as stack:
            try:
                what = "another process to tokenize the same rows"
                stack.enter_context(file_lock(self.root / f".{self.folder.name}.lock", waited, LONGEST_WAIT, what))
            except OSError as error:
                log.warning("%s cannot be locked (%s): processes may tokenize the same rows", self.root, error.strerror)
            yield
            self._keep_small()

    def _keep_small(self) -> None:
        """Remove other tokenizers' rows, the least recently used first, beyond EMA_TOKENS_GB."""
        most = gigabytes("EMA_TOKENS_GB", MOST_GB)
        for path in self._whole:
            with contextlib.suppress(OSError):  # not every disk notes when a file was read
                os.utime(path)
        for entry in keep_below(self.root.parent, ("tokens", "datasets"), int(most * 1e9)) if self._has_grown else ():
            log.info("%s: removed, to keep tokenized rows below %g GB (EMA_TOKENS_GB)", entry.path, most)

    def read(self, keys: Iterable[str]) -> dict[str, Encoded]:
        """Key -> what is there of these conversations. A damaged file is removed."""
        self._look()
        wanted: dict[tuple[Path, int], set[str]] = {}
        for key in keys:
            if (place := self._places.get(key)) is not None:
                wanted.setdefault(place, set()).add(key)
        found: dict[str, Encoded] = {}
        for (path, group), some in wanted.items():
            with self._damage(path):
                if path not in self._whole and not path.stem.endswith(_digest_of(path)):
                    raise ValueError("its digest is another")
                self._whole.add(path)
                found.update(_rows(_parquet(path).read_row_group(group), some))
        return found

    def _look(self) -> None:
        """Note which conversations are in files that are new."""
        for path in sorted(set(self.folder.glob("*.parquet")) - self._known):
            self._known.add(path)
            with self._damage(path):
                file = _parquet(path)
                for group in range(file.num_row_groups):
                    keys = file.read_row_group(group, columns=["key"])["key"].to_pylist()
                    self._places.update(dict.fromkeys(keys, (path, group)))

    @contextlib.contextmanager
    def _damage(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # pyarrow's errors are both
            if isinstance(error, OSError) and error.errno is not None:
                log.warning("%s cannot be read (%s); its rows are tokenized again", path, error.strerror or error)
            else:
                log.warning("%s is damaged; its rows are tokenized again", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                self._known.discard(path)
            self._places = {key: place for key, place in self._places.items() if place[0] != path}

    def add(self, encoded: Mapping[str, Encoded]) -> None:
        """Keep these, whole or not at all."""
        import pyarrow
        import pyarrow.parquet as parquet

        name = _digest("".join(encoded).encode())
        if not encoded or any(self.folder.glob(f"{name}-*")):  # another process of the same run was first
            return
        columns: dict[str, Any] = {"key": pyarrow.array(list(encoded), pyarrow.string())}
        for kind, type_ in zip(_LISTS, (pyarrow.int32(), pyarrow.bool_(), pyarrow.bool_()), strict=True):
            columns[kind] = _column([getattr(e, kind) for e in encoded.values()], type_)
        for kind in (*_FLAGS, *COUNTS):
            columns[kind] = pyarrow.array([int(getattr(e, kind)) for e in encoded.values()], pyarrow.int32())
        file = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table(columns), file, compression="zstd")
        data = file.getvalue().to_pybytes()
        try:
            atomic_write_bytes(self.folder / f"{name}-{_digest(data)}.parquet", data)
            self._has_grown = True
        except OSError as error:
            log.warning("%s: tokens are not kept for other runs (%s)", self.folder, error.strerror or error)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path)


def _column(arrays: list[Any], type_: Any) -> Any:
    """A column of lists, from arrays as they are; null where there is none."""
    import pyarrow

    if any(array is None for array in arrays):
        return pyarrow.array(arrays, pyarrow.list_(type_))
    offsets = pyarrow.array(np.cumsum([0, *map(len, arrays)]), pyarrow.int64())
    return pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(np.concatenate(arrays), type_))


def _rows(table: Any, wanted: set[str]) -> dict[str, Encoded]:
    keys = table["key"].to_pylist()
    lists = {name: _lists(table[name].combine_chunks()) for name in _LISTS}
    numbers = {name: table[name].to_pylist() for name in (*_FLAGS, *COUNTS)}
    found = {}
    for i, key in enumerate(keys):
        if key in wanted:
            flags: dict[str, Any] = {name: bool(numbers[name][i]) for name in _FLAGS}
            counts = {name: numbers[name][i] for name in COUNTS}
            flags |= {name: lists[name](i) for name in _LISTS}
            found[key] = Encoded(**flags, **counts)
    return found


def _lists(array: Any) -> Any:
    """Row number -> its numbers, or None: parts of one flat array."""
    starts, flat, there = np.asarray(array.offsets), array.values.to_numpy(False), array.is_valid().to_numpy(False)
    return lambda i: flat[starts[i] : starts[i + 1]] if there[i] else None


def _fingerprint(template: ChatTemplate, max_length: int | None, template_mask: bool) -> str:
    tokenizer = template.tokenizer
    made = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        [metadata.version(name) for name in ("transformers", "tokenizers")],
        [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in _CODE],
        [max_length, template_mask],
        template.written_date,
    ]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:24]
