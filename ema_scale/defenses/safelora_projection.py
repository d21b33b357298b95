"""SafeLoRA's projection of a LoRA adapter onto the alignment subspace: factored, and streamed matrix by matrix.

Hsu et al., "Safe LoRA", arXiv 2405.16833. For an adapted matrix, V = W_aligned - W_base and C = V V^T / ||V||_F; the
update B A is replaced by C B A where cos(C B A, B A) <= tau. C is [out, out] (85 GB over a 7B model) and is never
formed: C B = V (V^T B) / ||V||_F, and the cosine follows from r x r Gram matrices. The LoRA scale (rank-stabilised or
not, patterns of rank and alpha) cancels in the cosine and stays in front of the projected update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.defenses.safelora_files import WEIGHTS, Adapter, Checkpoint, finished, identity, same_models
from ema_scale.models.weights import adapter_files

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Projected:
    """One adapted matrix: its module name, shape of the update, rank, cos(C B A, B A), and whether B was replaced."""

    module: str
    shape: tuple[int, int]
    rank: int
    cosine: float
    replaced: bool


def project(b: torch.Tensor, a: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, float]:
    """C B and cos(C B A, B A).

    b: [out, r], a: [r, in], v: [out, in]; computed in the dtype of `b`. The cosine is 1.0 if it is undefined (V = 0 or
    B A = 0): there is nothing to project.
    """
    norm = v.norm()
    cb = v @ (v.T @ b) / norm if norm > 0 else b.clone()
    gram = a @ a.T
    dot, left, right = ((x @ gram * y).sum() for x, y in ((cb, b), (cb, cb), (b, b)))
    scale = (left * right).clamp_min(0).sqrt()
    return cb, float(dot / scale) if scale > 0 else 1.0


def project_adapter(
    adapter: Path,
    out: Path | None,
    base: Path,
    aligned: Path,
    *,
    threshold: float | None = None,
    layers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Projected]:
    """Write SafeLoRA's version of a PEFT adapter, with `safelora.json` beside it, and report every matrix.

    One pair of full matrices is in memory at a time. Give either `threshold` or `layers`.

    out: a new folder. If it holds this very projection already, it stays as it is. None: the adapter is replaced in its
        own folder.
    base, aligned: folders of safetensors checkpoints of one architecture.
    threshold: tau; matrices with a cosine at or below it are projected.
    layers: so many matrices are projected, lowest cosine first (`number` in the method's own code).
    progress: called with the matrices done, and their total.

    Raises UserError for a folder without what is needed, an `out` in use, an adapter that is not plain LoRA, shapes
    that differ, weights that are not finite, and models that do not differ.
    """
    if (threshold is None) == (layers is None):
        raise UserError("SafeLoRA needs either a threshold or a number of layers: not both, not neither")
    made_from = {
        "adapter": str(adapter),
        "adapter_sha256": file_sha256(adapter_files(str(adapter)) / WEIGHTS),
        "base": str(base),
        "base_identity": identity(base),
        "aligned": str(aligned),
        "aligned_identity": identity(aligned),
        "threshold": threshold,
        "layers": layers,
    }
    if out is not None and (there := finished(out, made_from)) is not None:
        return [Projected(**{**matrix, "shape": tuple(matrix["shape"])}) for matrix in there["matrices"]]
    source = Adapter(adapter)
    before, after = Checkpoint(base), Checkpoint(aligned)
    candidates: dict[str, tuple[torch.Tensor, float]] = {}
    moved = False
    for module, (key_a, key_b) in source.pairs.items():
        a, b = source.tensors[key_a].float(), source.tensors[key_b].float()
        v = _difference(before, after, module)
        if source.config.get("fan_in_fan_out"):  # GPT-2's Conv1D keeps [in, out]
            v = v.T
        if v.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise UserError(
                f"{module}: the adapter updates {b.shape[0]} x {a.shape[1]}, the weights are {tuple(v.shape)}"
            )
        moved = moved or bool(v.any())
        candidates[module] = project(b, a, v)
        if progress:
            progress(len(candidates), len(source.pairs))
    if not moved:
        raise UserError(same_models(base, aligned))
    if threshold is not None:
        chosen = {module for module, (_, cosine) in candidates.items() if cosine <= threshold}
    else:
        chosen = set(sorted(candidates, key=lambda module: candidates[module][1])[:layers])
    results = []
    for module, (cb, cosine) in candidates.items():
        key_a, key_b = source.pairs[module]
        old = source.tensors[key_b]
        if module in chosen:
            source.tensors[key_b] = cb.to(old.dtype).contiguous()
        shape = (old.shape[0], source.tensors[key_a].shape[1])
        results.append(Projected(module, shape, old.shape[1], cosine, module in chosen))
    source.write(
        out,
        {
            "schema": 1,
            "source": "Hsu et al., Safe LoRA, arXiv 2405.16833",
            **made_from,
            "projected": len(chosen),
            "matrices": [asdict(result) for result in results],
        },
    )
    return results


def _difference(before: Checkpoint, after: Checkpoint, module: str) -> torch.Tensor:
    """W_aligned - W_base, float32 [out, in] as stored: exact for neighbouring bfloat16 weights."""
    w0, w1 = before.weight(module), after.weight(module)
    if w0.shape != w1.shape:
        raise UserError(f"{module}: base is {tuple(w0.shape)}, aligned {tuple(w1.shape)}; expected the same")
    return w1.float().sub_(w0)
