"""Hashes of files, checkpoints and plain values."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

from ema_scale.core.files import open_file


def file_sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes. Raises UserError for a pipe or a device, and for what cannot be read."""
    with open_file(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sampled_sha256(file: Path) -> str:
    """Hex SHA-256 of a weight file's size and of some blocks. Files of up to 256 MiB are read whole.

    Fine-tunes of one model differ in every block, so some blocks identify them.
    """
    size, blocks, block = file.stat().st_size, 64, 1 << 16
    if size <= 1 << 28:
        return file_sha256(file)
    hasher = hashlib.sha256(str(size).encode())
    with open(file, "rb") as handle:
        for i in range(blocks):
            handle.seek((size - block) * i // (blocks - 1))
            hasher.update(handle.read(block))
    return hasher.hexdigest()


def digest(*parts: Any) -> str:
    """12 hex digits of the SHA-256 of these JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def question_key(text: str) -> str:
    """16 hex digits that stand for a question, whatever its case, its spaces and the marks around it."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .?!…\"'“”‘’")
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip


def folder_identity(path: str, revision: str | None = None, base_path: bool = True) -> str:
    """A digest of a checkpoint or adapter: config and tokenizer files whole, weights by `sampled_sha256`.

    An adapter's tokenizer is the base model's, which is used in its place, so it does not count.

    Args:
        path: a folder, or a hub id, which is identified by its name and revision.
        revision: of the hub id.
        base_path: whether the path of an adapter's base model counts, which its config names.
    """
    folder = Path(path)
    if not folder.is_dir():
        return digest(path, revision)
    found = []
    ignored = _TOKENIZER_FILES if (folder / ADAPTER_CONFIG).exists() else ()
    for file in sorted(folder.iterdir()):
        if file.name in ignored:
            continue
        if file.name == ADAPTER_CONFIG and not base_path:
            found.append((file.name, digest(_without_base_path(file))))
        elif file.suffix in {".json", ".jinja", ".model", ".txt"}:
            found.append((file.name, file_sha256(file)))
        elif file.suffix == ".safetensors":
            found.append((file.name, sampled_sha256(file)))
    return digest(found)


def _without_base_path(config: Path) -> Any:
    try:
        found = json.loads(config.read_bytes())
    except ValueError:  # whoever loads the adapter says so
        return file_sha256(config)
    if isinstance(found, dict):
        found.pop("base_model_name_or_path", None)
    return found
