"""Trained weights and optimizer state as whole tensors by name, however the run shards them.

A ZeRO checkpoint of shards resumes only on as many processes as wrote it; whole tensors resume on any number,
and for an adapter they are small.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ema_scale.core.errors import UserError
from ema_scale.models.sharding import full_shape, full_tensor, gathered, shard_like, under_zero3

_LORA_WEIGHT = "weight"


_SEPARATOR = "|"


def optimizer_of(optimizer: Any) -> Any:
    """The torch optimizer inside Accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def read_weights(model: Any) -> dict[str, Tensor]:
    """Name -> trained weight, whole, on the CPU; the same on every process. A collective."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with gathered([p for _, p in trained]):
        return {name: full_tensor(p).detach().cpu().clone() for name, p in trained}


@torch.no_grad()
def write_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Put back what `read_weights` gave; a collective. Of the forward weights alone: an optimizer under DeepSpeed,
    which has its own, must not go on from there."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter], write=True):
                parameter.copy_(shard_like(weights[name].to(parameter.dtype), parameter))


class TrainedState:
    """Reads and writes "<parameter>|weight" and "<parameter>|<optimizer state>" tensors. Both are
    collectives.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.inner = optimizer_of(optimizer)
        wrapper = getattr(optimizer, "optimizer", optimizer)
        self.zero: Any = wrapper if wrapper is not self.inner else None

    def read(self) -> dict[str, Tensor]:
        """On the CPU; the same on every process. Raises UserError if a weight is not finite."""
        tensors = self._read_sharded() if self.zero is not None else self._read_plain()
        for name, tensor in tensors.items():
            if name.endswith(_SEPARATOR + _LORA_WEIGHT) and not torch.isfinite(tensor).all():
                raise UserError(f"{name.split(_SEPARATOR)[0]} is not finite any more; lower the learning rate")
        return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}

    def write(self, tensors: dict[str, Tensor], origin: Path) -> None:
        """Raises UserError unless the tensors are exactly those of this model's trained parameters."""
        for name, parameter in self.trained:
            found = tensors.get(f"{name}{_SEPARATOR}{_LORA_WEIGHT}")
            shape = full_shape(parameter)
            if found is None or tuple(found.shape) != shape:
                shown = "nothing" if found is None else tuple(found.shape)
                raise UserError(f"{origin}: found {shown} for {name}, expected {shape}; it is of another run")
        if self.zero is not None:
            self._write_sharded(tensors)
        else:
            self._write_plain(tensors)

    def _read_plain(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.trained:
            tensors[f"{name}{_SEPARATOR}{_LORA_WEIGHT}"] = full_tensor(parameter)
            for key, value in self.inner.state.get(parameter, {}).items():
                tensors[f"{name}{_SEPARATOR}{key}"] = full_tensor(torch.as_tensor(value))
        return tensors

    @torch.no_grad()
    def _write_plain(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.trained:
            mine = _state_of(tensors, name)
            parameter.copy_(shard_like(mine.pop(_LORA_WEIGHT), parameter))
            self.inner.state[parameter] = {
                key: self._count(value, parameter) if key == "step" else shard_like(value, parameter)
                for key, value in mine.items()
            }

    def _count(self, value: Tensor, parameter: Any) -> Tensor:
        """A state that counts steps, where the optimizer looks for it: as in torch's Optimizer.load_state_dict, beside
        the parameter if its group is fused or capturable, else on the CPU."""
        groups = self.inner.param_groups
        # ZeRO-3 puts a flat partition into its group for the length of a step alone; its groups are alike.
        own = [group for group in groups if any(p is parameter for p in group["params"])] or groups
        beside = any(group.get("fused") or group.get("capturable") for group in own)
        return value.to(parameter.device, torch.float32, copy=True) if beside else value.clone()

    # ---- DeepSpeed: state lives in flat float32 partitions ----

    def _flats(self) -> list[Tensor]:
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
            if hasattr(self.zero, name):
                return list(getattr(self.zero, name))
        raise UserError(f"checkpoints under {type(self.zero).__name__} are not supported; use ZeRO stage 1, 2 or 3")

    def _read_sharded(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        shared = self.inner.state.get(self._flats()[0], {})
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trained:
            tensors[f"{name}{_SEPARATOR}{_LORA_WEIGHT}"] = safe_get_full_fp32_param(parameter)
            for key, value in shared.items():
                whole = torch.as_tensor(value)
                if whole.dim() > 0:
                    whole = safe_get_full_optimizer_state(parameter, key)
                tensors[f"{name}{_SEPARATOR}{key}"] = whole
        return tensors

    @torch.no_grad()
    def _write_sharded(self, tensors: dict[str, Tensor]) -> None:
        first = _state_of(tensors, self.trained[0][0])
        first.pop(_LORA_WEIGHT)
        for flat in self._flats():  # torch makes the state at its first step; it must exist to be filled
            self.inner.state[flat] = {
                key: self._count(value, flat) if value.dim() == 0 else torch.zeros_like(flat)
                for key, value in first.items()
            }
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._lazy_init_hp_params_optimizer_state()  # ZeRO 1 and 2: parameters learn where it is
        for name, parameter in self.trained:
            mine = _state_of(tensors, name)
            with gathered([parameter], write=True):
                parameter.data.copy_(mine[_LORA_WEIGHT])
            for key, value in mine.items():
                if value.dim() > 0:
                    _set_partition(parameter, value.float(), None if key == _LORA_WEIGHT else key)


def _set_partition(parameter: Any, value: Tensor, key: str | None) -> None:
    if not under_zero3(parameter):
        parameter.set_full_hp_param(value.to(parameter.device), key)
        return
    zero = parameter._z3_optimizer
    size = parameter.ds_tensor.numel()
    # The last partition is padded when the parameter does not divide; DeepSpeed's own setter fails there.
    rank = zero._get_param_partition_rank(parameter)
    flat = torch.nn.functional.pad(value.flatten(), (0, size * (rank + 1)))
    zero.set_local_hp_param(flat.narrow(0, size * rank, size).to(parameter.device), parameter, key)


def _state_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = name + _SEPARATOR
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def gather_rng_states(accelerator: Any) -> dict[str, Tensor]:
    """ "<rank>.<generator>" -> state, of all processes; a collective."""
    local = _read_rng_state()
    if accelerator.num_processes == 1:
        return {f"0.{name}": state for name, state in local.items()}
    device = accelerator.device
    gathered = {name: accelerator.gather(state.to(device).unsqueeze(0)).cpu() for name, state in sorted(local.items())}
    return {
        f"{rank}.{name}": states[rank].contiguous()
        for name, states in gathered.items()
        for rank in range(accelerator.num_processes)
    }


def restore_rng_state(saved: dict[str, Tensor], rank: int) -> None:
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


def _read_rng_state() -> dict[str, Tensor]:
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
