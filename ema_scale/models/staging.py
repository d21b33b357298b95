"""Base models on a node's own disk, for clusters whose shared disk is slow when many nodes read it at once."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import folder_identity
from ema_scale.core.io import atomic_path, file_lock
from ema_scale.core.text import format_bytes
from ema_scale.models.weights import folder_of

log = logging.getLogger(__name__)
_COPIED = {".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
_PATIENCE = 3600.0  # seconds that a process waits for another one's copy


def staged(reference: str, revision: str | None = None, cache: str | None = None) -> str:
    """Where to load a base model from: a copy below EMA_SCRATCH, made once per node, or `reference` without it.

    A model that cannot be copied is loaded from where it is; the log says so. The copy is known by the hashes of the
    model's files, so that a changed model gets a new one.

    Args:
        reference: a folder or hub id.
        revision: of a hub id.
        cache: the hub's cache; None: its usual one.
    """
    scratch = os.environ.get("EMA_SCRATCH")
    if not scratch:
        return reference
    root = Path(os.path.expandvars(os.path.expanduser(scratch))) / f"ema-models-{os.getuid()}"
    if "$" in str(root) or not root.is_absolute():
        raise UserError(f"EMA_SCRATCH: found {scratch!r}, which is {root} here; expected a folder's whole path")
    source = folder_of(reference, revision, cache)
    files = [file for file in sorted(source.iterdir()) if file.suffix in _COPIED and file.is_file()]
    target = root / f"{source.name}-{folder_identity(str(source))}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise OSError(f"{root} belongs to another user")
        busy = UserError(f"{target}: another process has been copying {reference} there for an hour; delete its lock")
        with file_lock(root / f".{target.name}.lock", busy, _PATIENCE, f"{reference} to be copied to {root}"):
            if not target.is_dir():
                size, free = sum(file.stat().st_size for file in files), shutil.disk_usage(root).free
                if size >= free:
                    raise OSError(f"it takes {format_bytes(size)}, and {root} has {format_bytes(free)} free")
                log.info("copying %s (%s) to %s", reference, format_bytes(size), root)
                with atomic_path(target) as unfinished:
                    unfinished.mkdir()
                    for file in files:
                        shutil.copy(file, unfinished / file.name)
    except OSError as error:
        log.warning("%s is loaded from where it is, not from EMA_SCRATCH: %s", reference, error)
        return reference
    return str(target)
