"""Checkpoints: only what training changes, complete or not there, and resumable on any number of processes.

checkpoint-N/ holds:
    state.safetensors: trained weights in float32 and the optimizer's state, as whole tensors by parameter name. A ZeRO
        checkpoint of shards resumes only on as many processes as wrote it; for an adapter, whole tensors are small.
    random.safetensors: the random generators of every process.
    trainer.json: scheduler, learning rates, and the metrics of every step if a defense watches them.
    kept.safetensors: weights that a defense may go back to.
    trainer_state.json: transformers' own.
    manifest.json: size and SHA-256 of each file.

It is written beside its place and renamed when the manifest is in. A folder without a matching manifest is never
resumed.
"""

from __future__ import annotations

import os
import random
import shutil
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from ema_scale.core.checkpoints import MANIFEST, _is_scheduled, is_complete, list_checkpoints, step_of
from ema_scale.core.disk import writing
from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.hashing import file_sha256
from ema_scale.core.io import atomic_write_json
from ema_scale.models.lora import write_adapter
from ema_scale.models.sharding import full_shape, full_tensor, gathered, shard_like, under_zero3
from ema_scale.models.weights import read_tensors

_LORA_WEIGHT = "weight"
_SEPARATOR = "|"


def _read_state(checkpoint: Path) -> dict[str, Any]:
    if not is_complete(checkpoint):
        raise UserError(f"{checkpoint}: incomplete or damaged; expected a folder with a matching {MANIFEST}")
    return dict(read_tensors(checkpoint / "state.safetensors"))


class Observer(Protocol):
    """What the checkpoints hold of the defenses that watch the training (`callbacks.DefenseObserver`)."""

    readings: list[dict[str, float]]
    reason: str | None

    def save(self, folder: Path) -> None: ...
    def restore(self, folder: Path, readings: list[dict[str, float]]) -> None: ...


class CheckpointMixin(Trainer):
    """Replaces transformers' checkpoints, which hold pickles, miss the sharded adapter, and are resumed when half
    written.

    keep_steps: steps at which a checkpoint is made, whatever save_steps says, and kept for good.
    unscheduled: this step is saved because of a stop or of keep_steps, not because of save_steps.
    """

    model: Any
    lr_scheduler: Any
    observer: Observer
    keep_steps: frozenset[int] = frozenset()
    unscheduled: bool = False

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """A collective. Raises UserError if a trained weight is not finite: no training could resume from it."""
        folder = Path(str(self.args.output_dir))
        final = folder / f"checkpoint-{self.state.global_step}"
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best == final or (best / MANIFEST).exists():
            self.state.best_model_checkpoint = str(best)
        tensors = TrainedState(self.model, self.optimizer).read()
        generators = gather_rng_states(self.accelerator)
        if self.accelerator.is_main_process and not is_complete(final):
            temporary = folder / f".{final.name}.tmp"
            with writing(final):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                try:
                    save_file(tensors, temporary / "state.safetensors")
                    write_adapter(self.model, _weights(self.model, tensors), temporary)  # so that PEFT loads it
                    save_file(generators, temporary / "random.safetensors")
                    atomic_write_json(temporary / "trainer.json", self._plain_state())
                    self.state.save_to_json(str(temporary / "trainer_state.json"))
                    self.observer.save(temporary)
                    self._seal(temporary, final)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
            self._rotate(folder)
        self.accelerator.wait_for_everyone()

    def _plain_state(self) -> dict[str, Any]:
        # Of scheduler and optimizer only what training changes. The rest comes from the recipe, and the number of
        # parameter groups depends on who wraps the optimizer (DeepSpeed drops empty ones). A fresh scheduler has the
        # numbers that are not finite (the best loss before the first evaluation) as well.
        state = self.lr_scheduler.state_dict()
        scheduler = {k: v for k, v in state.items() if v is None or (isinstance(v, int | float) and isfinite(v))}
        return {
            "scheduler": scheduler,
            "learning_rate": [g["lr"] for g in optimizer_of(self.optimizer).param_groups],
            "world_size": self.accelerator.num_processes,
            "readings": self.observer.readings,
        }

    def _seal(self, temporary: Path, final: Path) -> None:
        files = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            with open(path, "rb+") as handle:
                os.fsync(handle.fileno())
            files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        manifest = {
            "schema": 1, "step": self.state.global_step, "scheduled": not self.unscheduled, "files": files
        }  # fmt: skip
        atomic_write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)  # an incomplete one of the same step
        os.replace(temporary, final)

    def _rotate(self, folder: Path) -> None:
        """Delete checkpoints except: the newest save_total_limit scheduled ones, those of `keep_steps`, the best if it
        is loaded at the end, and the newest. Frequent stops must not cost those that an evaluation reads."""
        limit = self.args.save_total_limit
        sealed = [c for c in list_checkpoints(folder) if (c / MANIFEST).exists()]
        keep = {*sealed[-1:], *[c for c in sealed if _is_scheduled(c)][-limit:]} if limit else set(sealed)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            keep.add(Path(self.state.best_model_checkpoint))
        for checkpoint in sealed:
            if checkpoint not in keep and step_of(checkpoint) not in self.keep_steps:
                shutil.rmtree(checkpoint, ignore_errors=True)

    # ---- resuming ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers would take one more step behind the checkpoint of a run's last one."""
        if self.state.global_step >= self.state.max_steps or self.observer.reason is not None:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Does nothing: `_restore` reads weights and optimizer state together, once both exist."""

    def _load_best_model(self) -> None:
        """A collective. Raises UserError for an incomplete checkpoint."""
        best = Path(str(self.state.best_model_checkpoint))
        TrainedState(self.model, self.optimizer).write(_read_state(best), best)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return prepared

    def _restore(self, checkpoint: Path) -> None:
        """A collective. Raises UserError for an incomplete checkpoint or one of another adapter."""
        tensors = _read_state(checkpoint)
        plain = read_json(checkpoint / "trainer.json")
        TrainedState(self.model, self.optimizer).write(tensors, checkpoint)
        self.observer.restore(checkpoint, plain.get("readings", []))
        groups = optimizer_of(self.optimizer).param_groups
        rates = plain["learning_rate"]
        if len(set(rates)) == 1:
            rates = rates[:1] * len(groups)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        fresh = self.lr_scheduler.state_dict()
        self.lr_scheduler.load_state_dict({**fresh, **plain["scheduler"], "_last_lr": rates})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_rng_state(read_tensors(Path(checkpoint) / "random.safetensors"), self.accelerator.process_index)


# ---- trained weights and optimizer state ----


def optimizer_of(optimizer: Any) -> Any:
    """The torch optimizer inside Accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _weights(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> trained weight in the model's dtype, of the tensors of `TrainedState`."""
    return {
        name: tensors[f"{name}{_SEPARATOR}{_LORA_WEIGHT}"].to(p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def read_weights(model: Any) -> dict[str, Tensor]:
    """Name -> trained weight, whole, on the CPU; the same on every process. A collective."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with gathered([p for _, p in trained]):
        return {name: full_tensor(p).detach().cpu().clone() for name, p in trained}


@torch.no_grad()
def write_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Put back what `read_weights` gave. A collective.

    Only the forward pass's weights change. DeepSpeed's optimizer has its own copy and must not train on from here.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter], write=True):
                parameter.copy_(shard_like(weights[name].to(parameter.dtype), parameter))


class TrainedState:
    """Reads and writes "<parameter>|weight" and "<parameter>|<optimizer state>" tensors. Both are collectives."""

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
            tensor = tensors.get(f"{name}{_SEPARATOR}{_LORA_WEIGHT}")
            found, expected = None if tensor is None else tuple(tensor.shape), full_shape(parameter)
            if found != expected:
                raise UserError(
                    f"{origin}: found {found or 'nothing'} for {name}, expected {expected}; it is of another run"
                )
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
            state = _state_of(tensors, name)
            parameter.copy_(shard_like(state.pop(_LORA_WEIGHT), parameter))
            self.inner.state[parameter] = {
                key: self._step_count(value, parameter) if key == "step" else shard_like(value, parameter)
                for key, value in state.items()
            }

    def _step_count(self, value: Tensor, parameter: Any) -> Tensor:
        """The optimizer's step count on the device where it looks for it, as in torch's Optimizer.load_state_dict: that
        of the parameter if its group is fused or capturable, else the CPU."""
        groups = self.inner.param_groups
        # ZeRO-3 puts a flat partition into its group only for the duration of a step; its groups do not differ.
        own_groups = [group for group in groups if any(p is parameter for p in group["params"])] or groups
        on_device = any(group.get("fused") or group.get("capturable") for group in own_groups)
        return value.to(parameter.device, torch.float32, copy=True) if on_device else value.clone()

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
        for flat in self._flats():  # torch makes the state in its first step; it must exist to be filled
            self.inner.state[flat] = {
                key: self._step_count(value, flat) if value.dim() == 0 else torch.zeros_like(flat)
                for key, value in first.items()
            }
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._lazy_init_hp_params_optimizer_state()  # ZeRO 1 and 2: tells parameters where it is
        for name, parameter in self.trained:
            state = _state_of(tensors, name)
            with gathered([parameter], write=True):
                parameter.data.copy_(state[_LORA_WEIGHT])
            for key, value in state.items():
                if value.dim() > 0:
                    _set_partition(parameter, value.float(), None if key == _LORA_WEIGHT else key)


def _set_partition(parameter: Any, value: Tensor, key: str | None) -> None:
    if not under_zero3(parameter):
        parameter.set_full_hp_param(value.to(parameter.device), key)
        return
    zero = parameter._z3_optimizer
    size = parameter.ds_tensor.numel()
    # The last partition is padded if the parameter does not divide evenly. DeepSpeed's own setter fails there.
    rank = zero._get_param_partition_rank(parameter)
    flat = torch.nn.functional.pad(value.flatten(), (0, size * (rank + 1)))
    zero.set_local_hp_param(flat.narrow(0, size * rank, size).to(parameter.device), parameter, key)


def _state_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = name + _SEPARATOR
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def gather_rng_states(accelerator: Any) -> dict[str, Tensor]:
    """ "<rank>.<generator>" -> state, of all processes. A collective."""
    local = _read_rng_state()
    if accelerator.num_processes == 1:
        return {f"0.{name}": state for name, state in local.items()}
    device = accelerator.device
    by_name = {name: accelerator.gather(state.to(device).unsqueeze(0)).cpu() for name, state in sorted(local.items())}
    return {
        f"{rank}.{name}": states[rank].contiguous()
        for name, states in by_name.items()
        for rank in range(accelerator.num_processes)
    }


def restore_rng_state(saved: dict[str, Tensor], rank: int) -> None:
    """Set this process's generators. If the checkpoint was made by fewer processes, a further one keeps its seed."""
    state = {name.split(".", 1)[1]: t for name, t in saved.items() if name.startswith(f"{rank}.")}
    if not state:
        return
    version, *internal, has_gauss = state["python"].tolist()
    gauss = float(state["gauss"][0]) if has_gauss else None
    random.setstate((version, tuple(internal), gauss))
    *keys, position, has_normal = state["numpy"].tolist()
    normal = float(state["gauss"][1])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_normal, normal))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(state["cuda"])


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
