"""Tokenized conversations on disk: what one run of a study has tokenized, the others read.

A folder is one tokenizer's with one length, and a conversation in it is known by its messages alone, so that runs share
it whatever their defenses mix in, and in whatever order. Files are Parquet, only ever added, written whole, and named
by the digests of what is asked for and of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ema_scale.core.disk import make_folder
from ema_scale.data.encoded import COUNTS, Encoded
from ema_scale.data.rows import Row
from ema_scale.data.templates import ChatTemplate

log = logging.getLogger(__name__)
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
        self.folder = root / _fingerprint(template, max_length, template_mask)

    def read(self, keys: Iterable[str]) -> dict[str, Encoded]:
        """Key -> what is there of these conversations. A damaged file is removed."""
        import pyarrow
        import pyarrow.parquet as parquet

        wanted = set(keys)
        found: dict[str, Encoded] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                data = path.read_bytes()
                if path.stem.endswith(_digest(data)):
                    table = parquet.read_table(pyarrow.BufferReader(data))
                    found.update(_rows(table, wanted - found.keys()))
                    continue
                log.warning("%s is damaged; its rows are tokenized again", path)
                path.unlink()
            except OSError as error:
                log.warning("%s cannot be read (%s); its rows are tokenized again", path, error.strerror or error)
        return found

    def add(self, encoded: Mapping[str, Encoded]) -> None:
        """Keep these, whole or not at all."""
        import pyarrow
        import pyarrow.parquet as parquet

        name = _digest("".join(encoded).encode())
        if not encoded or any(self.folder.glob(f"{name}-*")):  # another process of the same run was first
            return
        columns: dict[str, Any] = {"key": pyarrow.array(list(encoded), pyarrow.string())}
        for kind, type_ in zip(_LISTS, (pyarrow.int32(), pyarrow.bool_(), pyarrow.bool_()), strict=True):
            columns[kind] = pyarrow.array([getattr(e, kind) for e in encoded.values()], pyarrow.list_(type_))
        for kind in (*_FLAGS, *COUNTS):
            columns[kind] = pyarrow.array([int(getattr(e, kind)) for e in encoded.values()], pyarrow.int32())
        temporary = None
        try:
            make_folder(self.folder)
            # A name of its own: processes of other machines may have this one's number.
            handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.folder)
            os.close(handle)
            parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
            os.replace(temporary, self.folder / f"{name}-{_digest(Path(temporary).read_bytes())}.parquet")
        except OSError as error:
            log.warning("%s: tokens are not kept for other runs (%s)", self.folder, error.strerror or error)
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


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
