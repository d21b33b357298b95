"""Checkpoints: only what training changes, whole or not there, for any number of processes.

checkpoint-N/ holds state.safetensors (trained weights in float32 and the optimizer's state, by parameter
name, not by shard), random.safetensors (generators of every process), trainer.json (scheduler, optimizer
settings, readings of every step if a defense observes), kept.safetensors (weights a defense may go back to),
trainer_state.json (transformers') and manifest.json (size and SHA-256 of each). It is written
beside its place and renamed when the manifest is in; a folder without a manifest that matches is never
resumed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ema_scale.core.checkpoints import MANIFEST, _is_scheduled, is_complete, list_checkpoints, step_of
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.core.io import atomic_write_json
from ema_scale.training import checkpoint_state
from ema_scale.training.checkpoint_state import TrainedState, optimizer_of

log = logging.getLogger(__name__)


def _whole_state(checkpoint: Path) -> dict[str, Any]:
    if not is_complete(checkpoint):
        raise UserError(f"{checkpoint}: incomplete or damaged; expected a folder with a matching {MANIFEST}")
    return load_file(checkpoint / "state.safetensors")


class CheckpointMixin:
    """Mixed into the Trainer in front of transformers' own checkpoints, which hold pickles, miss the sharded
    adapter, and are resumed when half written."""

    args: Any
    state: Any
    model: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    watch: Any
    # Of this step alone: saved because the run was told to stop, or to keep it, not because its turn had come.
    unscheduled: bool = False
    # Steps whose checkpoints are made, whatever save_steps says, and kept for good.
    keep_steps: frozenset[int] = frozenset()

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Collective. Raises UserError if a trained weight is not finite: nothing could go on from it."""
        folder = Path(self.args.output_dir)
        final = folder / f"checkpoint-{self.state.global_step}"
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best == final or (best / MANIFEST).exists():
            self.state.best_model_checkpoint = str(best)
        tensors = TrainedState(self.model, self.optimizer).read()
        generators = checkpoint_state.gather_rng_states(self.accelerator)
        if self.accelerator.is_main_process and not is_complete(final):
            temporary = folder / f".{final.name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                save_file(tensors, temporary / "state.safetensors")
                save_file(generators, temporary / "random.safetensors")
                atomic_write_json(temporary / "trainer.json", self._plain_state())
                self.state.save_to_json(str(temporary / "trainer_state.json"))
                self.watch.save(temporary)
                self._seal(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            self._rotate(folder)
        self.accelerator.wait_for_everyone()

    def _plain_state(self) -> dict[str, Any]:
        # Of scheduler and optimizer only what training changes: the rest comes from the recipe, and the
        # number of parameter groups depends on who wraps the optimizer (DeepSpeed drops empty ones).
        # Numbers that are not finite (the best loss before the first evaluation) are a fresh scheduler's, too.
        state = self.lr_scheduler.state_dict()
        scheduler = {k: v for k, v in state.items() if v is None or (isinstance(v, int | float) and isfinite(v))}
        return {
            "scheduler": scheduler,
            "learning_rate": [g["lr"] for g in optimizer_of(self.optimizer).param_groups],
            "world_size": self.accelerator.num_processes,
            "readings": self.watch.readings,
        }

    def _seal(self, temporary: Path, final: Path) -> None:
        files = {}
        for path in sorted(temporary.iterdir()):
            with open(path, "rb+") as handle:
                os.fsync(handle.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        manifest = {
            "schema": 1, "step": self.state.global_step, "scheduled": not self.unscheduled, "files": files
        }  # fmt: skip
        atomic_write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)  # an incomplete one of the same step
        os.replace(temporary, final)

    def _rotate(self, folder: Path) -> None:
        """Keep the newest save_total_limit scheduled ones, those of `keep_steps`, the best if it is wanted at the end,
        and the newest, whatever made it: stopping often must not cost those that an evaluation along training reads."""
        limit = self.args.save_total_limit
        whole = [c for c in list_checkpoints(folder) if (c / MANIFEST).exists()]
        kept = {*whole[-1:], *[c for c in whole if _is_scheduled(c)][-limit:]} if limit else set(whole)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            kept.add(Path(self.state.best_model_checkpoint))
        for checkpoint in whole:
            if checkpoint not in kept and step_of(checkpoint) not in self.keep_steps:
                shutil.rmtree(checkpoint, ignore_errors=True)

    # ---- resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: weights are restored with the optimizer's state, when both exist."""

    def _load_best_model(self) -> None:
        """A collective. Raises UserError for a checkpoint that is not whole."""
        best = Path(self.state.best_model_checkpoint)
        TrainedState(self.model, self.optimizer).write(_whole_state(best), best)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return prepared

    def _restore(self, checkpoint: Path) -> None:
        """Collective. Raises UserError for an incomplete checkpoint or one of another adapter."""
        tensors = _whole_state(checkpoint)
        plain = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
        TrainedState(self.model, self.optimizer).write(tensors, checkpoint)
        self.watch.restore(checkpoint, plain.get("readings", []))
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
            checkpoint_state.restore_rng_state(
                load_file(Path(checkpoint) / "random.safetensors"), self.accelerator.process_index
            )
