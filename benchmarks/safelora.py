"""`ema safelora` on random weights of Qwen2.5-7B's shape: seconds and peak memory of the command itself.

The target is under 2 minutes and under 4 GiB on 2 cores. Only the decoder's matrices are written, 13 GB in bfloat16
each for base and aligned model: embeddings and head have no adapter. There is one shard per layer. It is dropped from
the page cache, so that the command reads from the disk, as it would from a fresh checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ema_scale.core.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
HIDDEN, INTERMEDIATE, KEYS, LAYERS, RANK = 3584, 18944, 4 * 128, 28, 32
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


@dataclass(frozen=True)
class SafeLoRABench:
    """What was measured. weights_gb: 10^9 bytes read; seconds and peak_gib include the command's start-up."""

    layers: int
    matrices: int
    threads: int
    weights_gb: float
    seconds: float
    peak_gib: float


def bench_safelora(layers: int = LAYERS, threads: int = 2, folder: Path | None = None) -> SafeLoRABench:
    """Write the models to a temporary folder inside `folder`, run the command in its own process, clean up.

    Raises UserError if the disk is too small, or the command fails.
    """
    weights = 2 * 2 * layers * sum(rows * columns for rows, columns in MATRICES.values())
    root = Path(folder or tempfile.gettempdir())
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < 1.1 * weights + 2e9:
        raise UserError(
            f"{root}: {free / 1e9:.0f} GB free, the models of {layers} layers need {weights / 1e9:.0f} GB and room to "
            "spare; give another folder, or fewer layers of the shape"
        )
    with tempfile.TemporaryDirectory(prefix="ema-bench-", dir=root) as made:
        place = Path(made)
        write_models(place, layers, threads)
        seconds, peak = _run_command(place, threads)
        report = json.loads((place / "out" / "safelora.json").read_text(encoding="utf-8"))
    return SafeLoRABench(layers, len(report["matrices"]), threads, weights / 1e9, seconds, peak)


def write_models(place: Path, layers: int, threads: int) -> None:
    """base/, aligned/ (bfloat16, sharded) and adapter/ (float32, r = 32, as PEFT saves it) below `place`."""
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    largest = max(rows * columns for rows, columns in MATRICES.values())
    # Slices of one pool at random places: drawing 13 billion numbers would take longer than the benchmark.
    pool = torch.randn(largest + 2**24, generator=generator).to(torch.bfloat16)

    def draw(shape: tuple[int, ...], size: float) -> torch.Tensor:
        count = shape[0] * shape[1]
        start = int(torch.randint(len(pool) - count, (1,), generator=generator))
        return pool[start : start + count].view(shape) * size

    files: dict[str, dict[str, str]] = {"base": {}, "aligned": {}}
    adapter: dict[str, torch.Tensor] = {}
    for layer in tqdm(range(layers), desc="random models", unit="layer", leave=False):
        shards: dict[str, dict[str, torch.Tensor]] = {"base": {}, "aligned": {}}
        for name, (rows, columns) in MATRICES.items():
            module = f"model.layers.{layer}.{name}"
            weight = draw((rows, columns), 0.02)
            shards["base"][f"{module}.weight"] = weight
            shards["aligned"][f"{module}.weight"] = weight + draw((rows, columns), 0.002)
            adapter[f"base_model.model.{module}.lora_A.weight"] = draw((RANK, columns), 0.01).float()
            adapter[f"base_model.model.{module}.lora_B.weight"] = draw((rows, RANK), 0.01).float()
        for model, tensors in shards.items():
            shard = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
            _save_cold(tensors, place / model / shard)
            files[model].update(dict.fromkeys(tensors, shard))
    for model, weight_map in files.items():
        (place / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _save_cold(adapter, place / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "use_rslora": True}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _save_cold(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run_command(place: Path, threads: int) -> tuple[float, float]:
    """Wall seconds and peak resident GiB of `ema safelora` in its own process."""
    command = [
        sys.executable, "-m", "ema_scale", "safelora", str(place / "adapter"), "--base", str(place / "base"),
        "--aligned", str(place / "aligned"), "--out", str(place / "out"),
    ]  # fmt: skip
    with open(place / "log.txt", "w+", encoding="utf-8") as log:
        start = time.monotonic()
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        seconds = time.monotonic() - start
        if status:
            log.seek(0)
            raise UserError(f"ema safelora failed:\n{log.read()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB here
    return seconds, usage.ru_maxrss * unit / 2**30
