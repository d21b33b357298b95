"""The adapter as it was at a checkpoint, as an ordinary PEFT folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_path
from ema_scale.models.weights import read_tensors

_WEIGHT = "|weight"
_FILE = "adapter_model.safetensors"


def export_adapter(checkpoint: Path, finished: Path, out: Path) -> Path:
    """Write the adapter of a training checkpoint to `out`, complete or not at all; returns `out`.

    The adapter is as training left it, before any defense's `after_training`. If `out` holds one, it stays.

    finished: the adapter folder of the same run, whose config, names and dtypes are used.

    Raises UserError if the checkpoint holds other weights.
    """
    if (out / _FILE).is_file():
        return out
    state = read_tensors(checkpoint / "state.safetensors")
    # PEFT leaves the adapter's name out of a saved adapter.
    weights = {k.removesuffix(_WEIGHT).replace(".default.", "."): v for k, v in state.items() if k.endswith(_WEIGHT)}
    final = read_tensors(finished / _FILE)
    missing = sorted(name for name, like in final.items() if name not in weights or weights[name].shape != like.shape)
    if missing:
        raise UserError(f"{checkpoint}: holds no weight {missing[0]} of that shape; it is of another run")
    with atomic_path(out) as temporary:
        temporary.mkdir()
        tensors = {name: weights[name].to(like.dtype) for name, like in final.items()}
        save_file(tensors, temporary / _FILE, {"format": "pt"})
        shutil.copy2(finished / "adapter_config.json", temporary)
        shutil.rmtree(out, ignore_errors=True)
    return out
