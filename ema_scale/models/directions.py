"""Directions in the hidden states of a model, one per layer, such as a persona vector, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import parse_json
from ema_scale.core.io import atomic_path
from ema_scale.models.layout import decoder_layers, hidden_size
from ema_scale.models.weights import check_finite, open_tensors

if TYPE_CHECKING:
    import torch

_TENSOR, _PROVENANCE = "vectors", "provenance"


@dataclass(frozen=True)
class Directions:
    """vectors: float32 [num_layers + 1, H], of any length. Row 0 belongs to the embeddings, row k to the hidden states
        after decoder layer k, before the final norm.
    provenance: how they were made, JSON values only. Its `recommended_layer` is what `at_layers: auto` means.
    source: where they are from, for error messages.

    Raises UserError for vectors of another shape, or that are not finite numbers.
    """

    vectors: torch.Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)
    source: str = "directions"

    def __post_init__(self) -> None:
        import torch

        vectors = self.vectors
        if not vectors.is_floating_point() or vectors.dim() != 2 or vectors.shape[0] < 2:
            found = f"{str(vectors.dtype).removeprefix('torch.')} {list(vectors.shape)}"
            raise UserError(f"{self.source}: found {found}, expected floats of shape [layers + 1, hidden size]")
        if not torch.isfinite(vectors).all():
            raise UserError(f"{self.source}: holds values that are not finite numbers")
        object.__setattr__(self, "vectors", vectors.detach().to("cpu", torch.float32).contiguous())

    @property
    def num_layers(self) -> int:
        return int(self.vectors.shape[0]) - 1

    @property
    def hidden_size(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def recommended_layer(self) -> int:
        """Raises UserError if the provenance names none."""
        layer = self.provenance.get("recommended_layer")
        if not isinstance(layer, int) or not 0 <= layer <= self.num_layers:
            raise UserError(f"{self.source}: its provenance recommends no layer; name the layers yourself")
        return layer

    def choose(self, layers: str | Sequence[int]) -> tuple[int, ...]:
        """auto: the recommended layer; all: every decoder layer; a list: its layers, sorted, each once."""
        if layers == "all":
            return tuple(range(1, self.num_layers + 1))
        return (self.recommended_layer,) if isinstance(layers, str) else tuple(sorted(set(layers)))

    def vector(self, layer: int) -> torch.Tensor:
        """[H], as stored. Raises UserError for a layer that does not exist."""
        if not 0 <= layer <= self.num_layers:
            raise UserError(f"{self.source}: found layer {layer}, expected 0 to {self.num_layers}")
        return self.vectors[layer]

    def unit(self, layer: int) -> torch.Tensor:
        """[H], of length 1. Raises UserError for a layer that does not exist, or whose vector is zero."""
        vector = self.vector(layer)
        norm = vector.norm()
        if norm == 0:
            raise UserError(f"{self.source}: the vector of layer {layer} is zero, it has no direction")
        return vector / norm

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raises UserError unless the directions are of a model of that depth and width."""
        if (self.num_layers, self.hidden_size) != (num_layers, hidden_size):
            raise UserError(
                f"{self.source}: made for {self.num_layers} layers of hidden size {self.hidden_size}, "
                f"the model has {num_layers} of {hidden_size}"
            )

    @classmethod
    def of_model(cls, path: Path | str, model: Any) -> Directions:
        """Those of a file, for this model. Raises UserError as `load` and `check` do."""
        directions = cls.load(path)
        directions.check(len(decoder_layers(model)), hidden_size(model))
        return directions

    def save(self, path: Path | str) -> None:
        """One safetensors file: tensor `vectors`, metadata `provenance` (JSON). Written completely or not at all."""
        from safetensors.torch import save_file

        metadata = {"format": "pt", _PROVENANCE: json.dumps(dict(self.provenance), allow_nan=False)}
        with atomic_path(path) as temporary:
            save_file({_TENSOR: self.vectors}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path | str) -> Directions:
        """Raises UserError for a file that is missing, is no safetensors file, or holds something else."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected directions, as `ema vector` makes them")
        with open_tensors(path) as handle:
            names = list(handle.keys())
            if _TENSOR not in names:
                found = ", ".join(names[:3]) or "nothing"
                raise UserError(f"{path}: found the tensors {found}, expected `{_TENSOR}`, as `ema vector` makes it")
            vectors = handle.get_tensor(_TENSOR)
            text = (handle.metadata() or {}).get(_PROVENANCE, "{}")
        check_finite([(_TENSOR, vectors)], str(path))
        provenance = parse_json(text, f"{path}: its provenance")
        if not isinstance(provenance, dict):
            raise UserError(f"{path}: its provenance is {type(provenance).__name__}, expected a JSON object")
        return cls(vectors, provenance, str(path))
