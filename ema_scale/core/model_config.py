"""Sizes in a checkpoint's config.json, before a model is made of them: a billion layers would take for ever."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json

_LAYERS, _WIDTH, _HEADS, _VOCABULARY, _POSITIONS = 10_000, 10**6, 10**5, 10**8, 10**9
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "moe_intermediate_size"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), _HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _HEADS),
    "vocab_size": _VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _POSITIONS),
}


def check_config_file(folder: Path) -> None:
    """`check_config` of a folder's config.json. Raises UserError, also if it is no JSON object."""
    path = folder / "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}, expected a JSON object")
    check_config(values, str(path))


def check_config(values: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a size that is no whole number in a range that any model has."""
    for name, value in values.items():
        if isinstance(value, Mapping):  # text_config and others
            check_config(value, where)
        elif (most := _MOST.get(name)) is not None and value is not None:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 1 <= value <= most:
                shown = f"{value!r:.40}"
                raise UserError(f"{where}: {name}: found {shown}, expected a whole number from 1 to {most:,}")
