"""What happens between the steps of a DefendedTrainer: stopping, checkpoints on request, and defenses that watch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from ema_scale.defenses.base import Defense
from ema_scale.models.weights import open_tensors, read_tensors
from ema_scale.reference.strategy import ReferenceStrategy
from ema_scale.training.checkpointing import read_weights, write_weights
from ema_scale.training.forward import DefendedForward
from ema_scale.training.metrics import Monitor
from ema_scale.training.reference_setup import check_after_first_step

SNAPSHOTS = "kept.safetensors"


@dataclass
class StopFlag:
    """A request to stop the training at the end of a step, with a checkpoint.

    requested: this process was asked, by a signal, at any moment.
    agreed: some process was asked, and all know it. Only then do they stop, after the same step: saving is a
        collective.
    """

    requested: bool = False
    agreed: bool = False


class ObservedTrainer(Protocol):
    """What the callbacks use of a DefendedTrainer."""

    model: Any
    defenses: Sequence[Defense]
    accelerator: Any
    monitor: Monitor
    defended: DefendedForward
    reference_choice: ReferenceStrategy
    keep_steps: frozenset[int]
    stop: StopFlag
    unscheduled: bool

    def on_reference_changed(self) -> None: ...


class StepHooks(TrainerCallback):
    """Calls `before_optimizer_step`, turns an agreed stop into a checkpoint, saves at `keep_steps`, and reports a
    reference that fell back."""

    def __init__(self, trainer: ObservedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for defense in self.trainer.defenses:
            defense.before_optimizer_step(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        choice = check_after_first_step(trainer.defended.reference, trainer.reference_choice)
        if choice != trainer.reference_choice:
            trainer.reference_choice = choice
            trainer.on_reference_changed()
        if trainer.accelerator.num_processes == 1:  # nobody to agree with, so stop at once
            trainer.stop.agreed = trainer.stop.requested
        save_now = trainer.stop.agreed or state.global_step in trainer.keep_steps
        trainer.unscheduled = save_now and not control.should_save
        control.should_save |= save_now
        control.should_training_stop |= trainer.stop.agreed


@dataclass(frozen=True)
class Snapshot:
    """The trained weights after a step, on the CPU."""

    step: int
    weights: dict[str, Tensor]


class DefenseObserver(TrainerCallback):
    """Lets defenses watch each step's metrics, end the training, and go back to an earlier adapter.

    names: for each defense, what it calls its terms -> what they are logged as.

    readings: the metrics of every step so far, those before a resume included.
    snapshots: by defense, what it asked to remember.
    reason: why a defense ended the training; None if none did.
    """

    def __init__(self, trainer: ObservedTrainer, names: list[dict[str, str]]) -> None:
        self.trainer, self.names = trainer, names
        self.observing = [i for i, d in enumerate(trainer.defenses) if type(d).overrides("should_stop")]
        self._clear()

    def _clear(self) -> None:
        self.readings: list[dict[str, float]] = []
        # If two defenses have a term of the same name, each sees its own under that name.
        self._history = {i: [] if self._renamed(i) else self.readings for i in self.observing}
        self.snapshots: dict[int, Snapshot] = {}
        self.reason: str | None = None
        self._stopped_by: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._clear()
        self._take_snapshots(state.global_step, [i for i in self.observing if i not in self.snapshots])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not self.observing:
            return
        self._add({"step": state.global_step, **trainer.monitor.reading(trainer.accelerator)})
        self._ask()
        if self.reason is not None:
            control.should_log = control.should_training_stop = True
        else:
            self._take_snapshots(state.global_step, self.observing)

    def _ask(self) -> None:
        """Ask the defenses whether the training ends here."""
        for index in self.observing:
            defense = self.trainer.defenses[index]
            reason = defense.should_stop(self._history[index])
            if reason and self.reason is None:
                self.reason, self._stopped_by = f"{defense.kind}: {reason}", index

    def _renamed(self, index: int) -> dict[str, str]:
        return {own: logged for own, logged in self.names[index].items() if own != logged}

    def _add(self, row: dict[str, float]) -> None:
        self.readings.append(row)
        for index, history in self._history.items():
            if history is not self.readings:
                names = self._renamed(index).items()
                history.append({**row, **{own: row[logged] for own, logged in names if logged in row}})

    def _take_snapshots(self, step: int, candidates: list[int]) -> None:
        defenses = self.trainer.defenses
        asking = [i for i in candidates if defenses[i].should_snapshot(self._history[i])]
        if asking:
            snapshot = Snapshot(step, read_weights(self.trainer.model))
            self.snapshots.update(dict.fromkeys(asking, snapshot))

    def restore_snapshot(self) -> None:
        """Put back the snapshot of the defense that ended the training, if it has one. A collective."""
        if self._stopped_by in self.snapshots:
            snapshot = self.snapshots[self._stopped_by]
            write_weights(self.trainer.model, snapshot.weights)
            self.reason = f"{self.reason}; the adapter is that of step {snapshot.step}"

    # ---- in checkpoints ----

    def save(self, folder: Path) -> None:
        if self.snapshots:
            # Defenses that remember the same step share its tensors in memory, which a file does not allow.
            tensors = {
                f"{i}|{name}": tensor.clone()
                for i, snapshot in self.snapshots.items()
                for name, tensor in snapshot.weights.items()
            }
            save_file(tensors, folder / SNAPSHOTS, {str(i): str(s.step) for i, s in self.snapshots.items()})

    def restore(self, folder: Path, readings: list[dict[str, float]]) -> None:
        self._clear()
        for row in readings:
            self._add(row)
        if readings:
            self._ask()  # it may be the checkpoint of the step that one of them ended the training at
        if not (folder / SNAPSHOTS).is_file():
            return
        tensors = read_tensors(folder / SNAPSHOTS)
        with open_tensors(folder / SNAPSHOTS) as handle:
            steps = handle.metadata()
        for index, step in steps.items():
            prefix = f"{index}|"
            weights = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            self.snapshots[int(index)] = Snapshot(int(step), weights)
