"""SafeLoRA's projection of a LoRA adapter onto the alignment subspace: factored, and streamed matrix by matrix.

Hsu et al., "Safe LoRA", arXiv 2405.16833. For an adapted matrix, V = W_aligned - W_base and C = V V^T / ||V||_F; the
update B A is replaced by C B A where cos(C B A, B A) <= tau. C is [out, out] (85 GB over a 7B model) and is never
formed: C B = V (V^T B) / ||V||_F, and the cosine follows from r x r Gram matrices. The LoRA scale (rank-stabilised or
not) cancels in the cosine and stays in front of the projected update.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.errors import UserError
from ema_scale.rundir import atomic_write_json

if TYPE_CHECKING:
    import torch

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Projected:
    """One adapted matrix: its module name, cos(C B A, B A), and whether B was replaced."""

    module: str
    cosine: float
    replaced: bool


def project(b: torch.Tensor, a: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, float]:
    """C B and cos(C B A, B A).

    b: [out, r], a: [r, in], v: [out, in]; computed in the dtype of `b`. The cosine is 1.0 where it is undefined
    (V = 0 or B A = 0): there is nothing to project.
    """
    norm = v.norm()
    cb = v @ (v.T @ b) / norm if norm > 0 else b.clone()
    gram = a @ a.T
    dot, left, right = ((x @ gram * y).sum() for x, y in ((cb, b), (cb, cb), (b, b)))
    scale = (left * right).clamp_min(0).sqrt()
    return cb, float(dot / scale) if scale > 0 else 1.0


def project_adapter(
    adapter: Path,
    out: Path,
    base: Path,
    aligned: Path,
    *,
    threshold: float | None = None,
    layers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Projected]:
    """Write SafeLoRA's version of a PEFT adapter to `out` (which may be `adapter`) and report every matrix.

    base, aligned: folders of safetensors checkpoints of the same architecture. Give either `threshold` (tau: project
    where the cosine is at or below it) or `layers` (project that many matrices, lowest cosine first). One pair of full
    matrices is in memory at a time. Raises UserError for a folder without what is needed, or shapes that differ.
    """
    from safetensors.torch import load_file, save_file

    if (threshold is None) == (layers is None):
        raise UserError("SafeLoRA needs either a threshold or a number of layers: not both, not neither")
    config = _read_config(adapter)
    tensors = load_file(adapter / _WEIGHTS)
    before, after = Checkpoint(base), Checkpoint(aligned)
    candidates: dict[str, tuple[torch.Tensor, float]] = {}
    for module, key_a, key_b in _lora_pairs(tensors):
        if progress:
            progress(module)
        w0, w1 = before.weight(module), after.weight(module)
        if w0.shape != w1.shape:
            raise UserError(f"{module}: base is {tuple(w0.shape)}, aligned {tuple(w1.shape)}; expected the same")
        v = w1.float().sub_(w0.float())
        if config.get("fan_in_fan_out"):  # GPT-2's Conv1D keeps [in, out]
            v = v.T
        a, b = tensors[key_a].float(), tensors[key_b].float()
        if v.shape != (b.shape[0], a.shape[1]):
            raise UserError(
                f"{module}: the adapter updates {b.shape[0]} x {a.shape[1]}, the weights are {tuple(v.shape)}"
            )
        candidates[key_b] = project(b, a, v)
    if threshold is not None:
        chosen = {key for key, (_, cosine) in candidates.items() if cosine <= threshold}
    else:
        chosen = set(sorted(candidates, key=lambda key: candidates[key][1])[:layers])
    for key in chosen:
        tensors[key] = candidates[key][0].to(tensors[key].dtype).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{_WEIGHTS}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, out / _WEIGHTS)
    atomic_write_json(out / "adapter_config.json", config)
    return [Projected(_module_of(key), cosine, key in chosen) for key, (_, cosine) in candidates.items()]


class Checkpoint:
    """Reads single matrices of a safetensors checkpoint, sharded or not, by module name."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        whole = folder / "model.safetensors"
        if index.is_file():
            self._files = {k: folder / f for k, f in json.loads(index.read_text())["weight_map"].items()}
        elif whole.is_file():
            from safetensors import safe_open

            with safe_open(whole, framework="pt") as handle:
                self._files = dict.fromkeys(handle.keys(), whole)
        else:
            raise UserError(f"{folder}: no model.safetensors here; expected a checkpoint in safetensors")
        self._folder = folder

    def weight(self, module: str) -> torch.Tensor:
        """The `.weight` of a module, as stored. Checkpoints may leave out the backbone's own prefix (GPT-2 does).

        Raises UserError if the checkpoint has no such weight.
        """
        from safetensors import safe_open

        for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
            if name in self._files:
                with safe_open(self._files[name], framework="pt") as handle:
                    tensor: torch.Tensor = handle.get_tensor(name)
                return tensor
        raise UserError(f"{self._folder}: no weight for the adapted module {module}")


def _module_of(key: str) -> str:
    return key.removeprefix("base_model.model.").partition(".lora_")[0]


def _lora_pairs(tensors: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    # Biases and other extras of an adapter have no A/B pair: they are carried over untouched.
    for key_b in tensors:
        if key_b.endswith(".lora_B.weight"):
            key_a = key_b.replace(".lora_B.", ".lora_A.")
            if key_a not in tensors:
                raise UserError(f"the adapter has {key_b} without {key_a}")
            yield _module_of(key_b), key_a, key_b


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file() or not (adapter / _WEIGHTS).is_file():
        raise UserError(f"{adapter}: not a PEFT adapter; expected adapter_config.json and {_WEIGHTS}")
    config = dict(json.loads(path.read_text(encoding="utf-8")))
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise UserError(f"{adapter}: SafeLoRA projects plain LoRA adapters; found {config.get('peft_type')}")
    return config
