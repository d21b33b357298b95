"""Random generators of every process as plain tensors, so that checkpoints need no pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def gather(accelerator: Any) -> dict[str, Tensor]:
    """ "<rank>.<generator>" -> state, of all processes; a collective."""
    local = _read()
    if accelerator.num_processes == 1:
        return {f"0.{name}": state for name, state in local.items()}
    device = accelerator.device
    gathered = {name: accelerator.gather(state.to(device).unsqueeze(0)).cpu() for name, state in sorted(local.items())}
    return {
        f"{rank}.{name}": states[rank].contiguous()
        for name, states in gathered.items()
        for rank in range(accelerator.num_processes)
    }


def restore(saved: dict[str, Tensor], rank: int) -> None:
    """Set this process's generators; a process that had none then (fewer were run) keeps its seeded ones."""
    mine = {name.split(".", 1)[1]: t for name, t in saved.items() if name.startswith(f"{rank}.")}
    if not mine:
        return
    version, *internal, has_gauss = mine["python"].tolist()
    gauss = float(mine["gauss"][0]) if has_gauss else None
    random.setstate((version, tuple(internal), gauss))
    *keys, position, has_normal = mine["numpy"].tolist()
    normal = float(mine["gauss"][1])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_normal, normal))
    torch.random.set_rng_state(mine["torch"])
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(mine["cuda"])


def _read() -> dict[str, Tensor]:
    version, internal, gauss = random.getstate()
    _, keys, position, has_normal, normal = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor([version, *internal, int(gauss is not None)], dtype=torch.int64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_normal], dtype=torch.int64),
        "gauss": torch.tensor([gauss or 0.0, normal], dtype=torch.float64),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state
