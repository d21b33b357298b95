"""Names of models and tasks: the last part of a path or hub id, and as much more as tells two apart.

A model or task is what its whole path says; its name is only read. Both work on a recipe's plain values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def model_label(path: str) -> str:
    """The last part of a path or hub id; small-world references stay as they are."""
    return _model_name(path, 1)


def task_label(train: Any) -> str:
    """`smallworld:train/medical?seed=1` is `medical`, `data/bad_legal.jsonl` `bad legal`, `org/set` `set`."""
    return _task_name(task_key(train), 1)


def model_key(model: Mapping[str, Any]) -> str:
    """A string equal for recipes' `model` sections of the same weights."""
    path, revision = str(model.get("path", "unknown model")), model.get("revision")
    path = path.rstrip("/") or path
    return f"{path}\n{revision}" if revision else path


def task_key(train: Any) -> str:
    """A string equal for `data.train` of the same files."""
    return "\n".join(str(source) for source in (train if isinstance(train, list) else [train]) if source)


def source_name(source: str, parts: int = 1) -> str:
    """The last `parts` of a path, without a file's suffix, a reference's parameters and underscores; if there are no
    more of them, all of it as it stands."""
    every = [part for part in re.sub(r"\?.*$", "", source).replace("\\", "/").split("/") if part]
    if parts > len(every):
        return source
    kept = re.sub(r"\.(jsonl?|csv|parquet)$", "", "/".join(every[-parts:]))
    return kept.removeprefix("smallworld:").replace("_", " ")


def _task_name(key: str, parts: int) -> str:
    return " + ".join(source_name(source, parts) for source in key.split("\n") if source) or "unknown task"


def _model_name(key: str, parts: int) -> str:
    path, _, revision = key.partition("\n")
    every = [part for part in path.split("/") if part]
    if parts > len(every) or path.startswith("smallworld:"):
        return f"{path}@{revision}" if revision and parts > 1 else path
    return "/".join(every[-parts:])
