"""Names of models, tasks and defenses for people, made of a recipe's plain values.

A model or task is what its whole path says; its name is the last part of it, and as much more as tells two apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ema_scale.core.hashing import digest


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


def file_slug(text: str) -> str:
    """A readable file name, different for different texts."""
    plain = re.sub(r"[^A-Za-z0-9.@+-]+", "_", text).strip("_.")
    return plain if plain == text and len(plain) <= 60 else f"{plain[:50]}_{digest(text)[:8]}".lstrip("_")


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


# The parameter that a paper's table would give beside the name.
_STRENGTHS = ("strength", "limit", "fraction", "alpha", "tau", "threshold", "weight")
# Settings that make another defense of one: said wherever they are not as usual, also beside no rival to be told from.
_USUAL = {
    "direction": "policy_reference",
    "temperature": 1.0,
    "scope": "all",
    "normalise": "unit",
    "against": "activations",
    "measure": None,
    "per": "token",
    "triggers": 0,
}


def defense_label(spec: Mapping[str, Any], title: str = "") -> str:
    """`KL 0.1`, `Interleaving 5 %`: a defense's title (default: its kind) with its strength and what is unusual."""
    kind = str(spec.get("kind", "?"))
    label = title or kind.replace("_", " ").replace("-", " ").capitalize()
    if spec.get("variant") == "++":
        label += "+"
    key = strength_key(spec)
    if key is not None:
        label += f" {spec[key] * 100:g} %" if key == "fraction" else f" {spec[key]:g}"
    if spec.get("prompts"):
        label += " on prompts"
    unusual = [f"{name} {short_value(spec[name])}" for name, usual in _USUAL.items() if spec.get(name, usual) != usual]
    return f"{label} ({', '.join(unusual)})" if unusual else label


def strength_key(spec: Mapping[str, Any]) -> str | None:
    """The parameter that sets how hard a defense pulls, or None if it has none."""
    numbers = (k for k in _STRENGTHS if isinstance(spec.get(k), (int, float)) and not isinstance(spec[k], bool))
    return next(numbers, None)


def short_value(value: Any) -> str:
    """A parameter's value in at most 30 characters."""
    if isinstance(value, list):
        value = " + ".join(source_name(str(item)) for item in value)
    elif isinstance(value, str) and "/" in value and not re.search(r"\s", value):
        value = source_name(value)
    text = f"{value:g}" if isinstance(value, float) else str(value).removeprefix("smallworld:").replace("_", " ")
    return text if len(text) <= 30 else f"…{text[-28:]}"
