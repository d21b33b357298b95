"""Checkpoints hold only what training changes, appear whole or not at all, and suit any number of processes.

checkpoint-N/ is a PEFT folder, as any tool loads it. It also holds state.safetensors (trained weights in float32 and
the optimizer's state, by parameter name, not by shard), random.safetensors (generators of every process), trainer.json
(scheduler, optimizer settings, readings of every step if a defense observes), kept.safetensors (weights that a defense
may return to), trainer_state.json (of transformers) and manifest.json (size and SHA-256 of each). The folder is written
under another name and renamed once the manifest is in. A folder whose manifest does not match is never resumed.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.hashing import file_sha256

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)$")


def step_of(folder: Path) -> int:
    """N of checkpoint-N."""
    found = _CHECKPOINT_NAME.search(folder.name)
    if found is None:
        raise UserError(f"{folder}: expected a folder named checkpoint-<step>")
    return int(found[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N folders, oldest first, complete or not."""
    return sorted((p for p in Path(folder).glob("checkpoint-*") if _CHECKPOINT_NAME.search(p.name)), key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the manifest is there with its size and SHA-256."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        return bool(files) and all(
            (checkpoint / name).stat().st_size == entry["bytes"] and file_sha256(checkpoint / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, UserError, KeyError, TypeError, AttributeError):
        return False


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that can be resumed. Damaged ones are logged and skipped."""
    for checkpoint in reversed(list_checkpoints(folder)):
        if is_complete(checkpoint):
            return checkpoint
        log.warning("%s is incomplete or damaged; it is not resumed", checkpoint)
    return None


def _is_scheduled(checkpoint: Path) -> bool:
    try:
        return bool(read_json(checkpoint / MANIFEST).get("scheduled", True))
    except (UserError, AttributeError):
        return False
