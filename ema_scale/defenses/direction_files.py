"""What defenses that read files of directions share: the files, their names and the layers of their use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ema_scale.core.numbers import CountOrZero

Files = str | list[str]
Layers = Literal["auto", "all"] | Annotated[list[CountOrZero], Field(min_length=1)]


def listed(files: Files) -> list[str]:
    return [files] if isinstance(files, str) else files


def trait_names(files: Files) -> list[str]:
    """One name per file: that of the file, or of its folder where `ema vector` has called it `vector.safetensors`."""
    paths = [Path(file) for file in listed(files)]
    stems = [path.parent.name if path.stem == "vector" and path.parent.name else path.stem for path in paths]
    return [f"{stem}_{stems[:i].count(stem) + 1}" if stem in stems[:i] else stem for i, stem in enumerate(stems)]


def check_files(files: Sequence[str], at_layers: Layers, model: Any) -> None:
    """Raises UserError for directions of a model of another shape, and layers that have none."""
    from ema_scale.models.directions import Directions

    for file in files:
        directions = Directions.of_model(file, model)
        for layer in directions.choose(at_layers):
            directions.unit(layer)


def layers_of(files: Sequence[str], at_layers: Layers, num_layers: int) -> tuple[int, ...]:
    """The layers at which any of the files is used.

    A plan may be made before the files are: it takes the middle one for what a file will recommend. Training refuses
    files that are missing before it asks.
    """
    if not isinstance(at_layers, str):
        return tuple(sorted(set(at_layers)))
    if at_layers == "all":
        return tuple(range(1, num_layers + 1))
    if not all(Path(file).is_file() for file in files):
        return (max(num_layers // 2, 1),)
    from ema_scale.models.directions import Directions

    return tuple(sorted({Directions.load(file).recommended_layer for file in files}))
