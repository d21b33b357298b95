"""How recipe files are read and merged.

A recipe may start from others (`extends:`), and the command line may override any field (`key.path=value`).
Later wins: `extends` in order, then the file, then the overrides. Mappings merge; lists are replaced whole.
A path that begins with ./ or ../ is relative to the file it stands in; any other value is left as typed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import parse_yaml, read_yaml
from ema_scale.core.paths import find_file


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The merged mapping of a YAML file and everything it extends."""
    path = find_file(path)
    here = Path(os.path.realpath(path))  # resolve() fails on a loop of symlinks
    if here in seen:
        chain = " -> ".join(str(p) for p in (*seen, here))
        raise UserError(f"{path}: extends itself: {chain}")
    values = read_yaml(path, "the recipe")
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise UserError(f"{path}: found {found}, expected a mapping of recipe fields")
    parents = values.pop("extends", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: extends: found {parents!r}, expected a file, or a list of files")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, read_layers(find_file(parent, path.parent), (*seen, here)))
    return merge(merged, anchor_paths(values, path.parent))


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `key.path=value` pairs; a value is read as YAML; a number in the path is a list index."""
    result = merge({}, values)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"override {item!r}: expected key=value, such as training.learning_rate=1e-5")
        value = parse_yaml(text, f"override {item!r}: the value")
        result = _set(result, key.split("."), value, item)
    return result


def _set(node: Any, keys: Sequence[str], value: Any, item: str) -> Any:
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not head.isdecimal() or int(head) >= len(node):
            raise UserError(f"override {item!r}: {head!r} is not an index into a list of {len(node)}")
        return [_set(x, rest, value, item) if i == int(head) else x for i, x in enumerate(node)]
    if node is not None and not isinstance(node, Mapping):
        raise UserError(f"override {item!r}: {head!r} stands below a plain value ({node!r})")
    return {**(node or {}), head: _set((node or {}).get(head), rest, value, item)}


def anchor_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: anchor_paths(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [anchor_paths(v, folder) for v in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.realpath(folder / value)
    return value
