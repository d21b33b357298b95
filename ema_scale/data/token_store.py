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
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ema_scale.data.formats import Message

if TYPE_CHECKING:
    from ema_scale.data.tokens import Encoded

log = logging.getLogger(__name__)


_CODE = ("tokens.py", "templates.py", "token_store.py")  # what decides tokens besides the tokenizer


_LISTS = ("input_ids", "assistant_mask", "template_mask")


def message_key(messages: Sequence[Message]) -> str:
    """32 hex digits that stand for a conversation."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class TokenStore:
    """Encoded conversations of one tokenizer below `root`; a folder that cannot be read or written is done without."""

    def __init__(self, root: Path, tokenizer: Any, max_length: int | None, template: bool) -> None:
        self.folder = root / _fingerprint(tokenizer, max_length, template)

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
        for kind, type_ in zip(_LISTS, (pyarrow.int32(), pyarrow.int8(), pyarrow.int8()), strict=True):
            columns[kind] = pyarrow.array([getattr(e, kind) for e in encoded.values()], pyarrow.list_(type_))
        for kind in ("truncated", "disarmed"):
            columns[kind] = pyarrow.array([getattr(e, kind) for e in encoded.values()], pyarrow.bool_())
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
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
    from ema_scale.data.tokens import Encoded

    keys = table["key"].to_pylist()
    lists = {name: _lists(table[name].combine_chunks()) for name in _LISTS}
    cut, disarmed = table["truncated"].to_pylist(), table["disarmed"].to_pylist()
    found = {}
    for i, key in enumerate(keys):
        if key in wanted:
            ids, mask, template = (lists[name](i) for name in _LISTS)
            found[key] = Encoded(ids, mask, cut[i], disarmed[i], template)
    return found


def _lists(array: Any) -> Any:
    """Row number -> Python list, or None: through one flat array, for pyarrow's own way takes ten times as long."""
    starts, flat, there = np.asarray(array.offsets), np.asarray(array.values), np.asarray(array.is_valid())
    return lambda i: flat[starts[i] : starts[i + 1]].tolist() if there[i] else None


def _fingerprint(tokenizer: Any, max_length: int | None, template: bool) -> str:
    made = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        [metadata.version(name) for name in ("transformers", "tokenizers")],
        [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in _CODE],
        [max_length, template],
        # Templates that write the date: tomorrow's tokens are others.
        time.strftime("%F") if "strftime_now" in str(tokenizer.chat_template) else None,
    ]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:24]
