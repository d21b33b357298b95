"""A defense to be timed on random rows: what it would read from files is made up, its share of the rows is marked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from peft import get_peft_model

from benchmarks.random_model import random_base
from ema_scale.core.errors import UserError
from ema_scale.defenses import Defense, parse
from ema_scale.defenses.registry import load
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.models.directions import Directions
from ema_scale.models.lora import lora_config

SHARE = 4  # one row in so many is of the part that a defense brings in


def priced(spec: str, fields: dict[str, Any], folder: Path) -> Defense:
    """The defense of `kind` or `{kind: ..., ...}`. Required fields that name files or rows are filled.

    Args:
        spec: as in a recipe.
        fields: of the model's config.
        folder: for files that are made.

    Raises UserError for a defense that needs something else.
    """
    values = yaml.safe_load(spec)
    values = dict(values) if isinstance(values, dict) else {"kind": values}
    cls = load(str(values.get("kind")))
    for name, asset in cls.assets().items():
        if cls.model_fields[name].is_required() and name not in values:
            values[name] = _made_up(str(cls.kind), asset, fields, folder)
    (defense,) = parse([values])
    return defense


def _made_up(kind: str, asset: str, fields: dict[str, Any], folder: Path) -> str:
    if "rows" in asset:
        return "random rows"
    if asset == "directions":
        count, width = fields["num_hidden_layers"], fields["hidden_size"]
        vectors = torch.randn(count + 1, width, generator=torch.Generator().manual_seed(0))
        path = folder / "vector.safetensors"
        Directions(vectors, {"recommended_layer": (count + 1) // 2}).save(path)
        return str(path)
    if "adapter" in asset:
        base = random_base(fields, "float32", "cpu")
        get_peft_model(base, lora_config(base)).save_pretrained(str(folder / "adapter"))
        return str(folder / "adapter")
    raise UserError(f"--defense {kind}: needs {asset}, which no benchmark makes up; give it: {{kind: {kind}, ...}}")


@contextlib.contextmanager
def marked(defense: Defense, rows: Any) -> Iterator[Any]:
    """The rows, one in SHARE tagged as brought in by the defense; inside, a trainer takes them as mixed in already."""
    (parts,) = RowGroups.of([defense]).part_names
    mixed = next(iter(parts), "task")
    tags = [mixed if index % SHARE == SHARE - 1 else "task" for index in range(len(rows))]
    with patch.object(type(defense), "changes_rows", False):
        yield rows.add_column("tag", tags)
