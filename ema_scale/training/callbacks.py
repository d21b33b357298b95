"""What is done between the steps of a DefendedTrainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ema_scale.defenses.base import Defense
from ema_scale.training.checkpoint_state import read_weights, write_weights
from ema_scale.training.reference_setup import check_after_first_step


class ObservedTrainer(Protocol):
    """What the callbacks use of a DefendedTrainer."""

    model: Any
    defenses: Sequence[Defense]
    accelerator: Any
    monitor: Any
    defended: Any
    reference_choice: Any
    keep_steps: frozenset[int]
    stop_wished: bool
    stop_agreed: bool
    unscheduled: bool

    def on_reference_changed(self) -> None: ...


class StepHooks(TrainerCallback):
    """Defenses' `step`; a wish to stop, once all processes agree on it, turned into a checkpoint, as steps are whose
    checkpoints are kept; a reference that fell back told about."""

    def __init__(self, trainer: ObservedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for defense in self.trainer.defenses:
            defense.step(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        choice = check_after_first_step(trainer.defended.reference, trainer.reference_choice)
        if choice != trainer.reference_choice:
            trainer.reference_choice = choice
            trainer.on_reference_changed()
        if trainer.accelerator.num_processes == 1:  # nobody to agree with: not one step more
            trainer.stop_agreed = trainer.stop_wished
        wanted = trainer.stop_agreed or state.global_step in trainer.keep_steps
        trainer.unscheduled = wanted and not control.should_save
        control.should_save |= wanted
        control.should_training_stop |= trainer.stop_agreed


KEPT = "kept.safetensors"


class DefenseObserver(TrainerCallback):
    """names: for each defense, what it calls its terms -> what they are logged as.

    `readings` are those of every step so far, of a resumed run's earlier part too. `kept` is, for the defenses that
    asked for it, the step and the trained weights (on the CPU) to go back to. `reason` is why a defense ended the
    training.
    """

    def __init__(self, trainer: ObservedTrainer, names: list[dict[str, str]]) -> None:
        self.trainer, self.names = trainer, names
        self.observing = [i for i, d in enumerate(trainer.defenses) if type(d).overrides("observe")]
        self._clear()

    def _clear(self) -> None:
        self.readings: list[dict[str, float]] = []
        # Of two defenses with the same term each sees its own, under its own name.
        self._seen = {i: self.readings if self._renamed(i) == {} else [] for i in self.observing}
        self.kept: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self.reason: str | None = None
        self._stopped_by: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._clear()
        self._keep(state.global_step, [i for i in self.observing if i not in self.kept])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if self.observing:
            self._add({"step": state.global_step, **trainer.monitor.reading(trainer.accelerator)})
            for index in self.observing:
                self._observe(index)
            if self.reason is not None:
                control.should_log = control.should_training_stop = True
            else:
                self._keep(state.global_step, self.observing)

    def _observe(self, index: int) -> None:
        defense = self.trainer.defenses[index]
        reason = defense.observe(self._seen[index])
        if reason and self.reason is None:
            self.reason, self._stopped_by = f"{defense.kind}: {reason}", index

    def _renamed(self, index: int) -> dict[str, str]:
        return {own: logged for own, logged in self.names[index].items() if own != logged}

    def _add(self, row: dict[str, float]) -> None:
        self.readings.append(row)
        for index, seen in self._seen.items():
            if seen is not self.readings:
                names = self._renamed(index).items()
                seen.append({**row, **{own: row[logged] for own, logged in names if logged in row}})

    def _keep(self, step: int, asked: list[int]) -> None:
        defenses = self.trainer.defenses
        asking = [i for i in asked if defenses[i].keeps(self._seen[i])]
        if asking:
            weights = read_weights(self.trainer.model)
            self.kept.update(dict.fromkeys(asking, (step, weights)))

    def go_back(self) -> None:
        """Put the weights back that the defense that ended the training asked to keep; a collective."""
        if self._stopped_by in self.kept:
            step, weights = self.kept[self._stopped_by]
            write_weights(self.trainer.model, weights)
            self.reason = f"{self.reason}; the adapter is that of step {step}"

    # ---- in checkpoints ----

    def save(self, folder: Path) -> None:
        if self.kept:
            tensors = {f"{i}|{name}": t for i, (_, weights) in self.kept.items() for name, t in weights.items()}
            # Defenses that keep the same step share its tensors in memory, which a file does not.
            save_file({k: t.clone() for k, t in tensors.items()}, folder / KEPT, dict(self._steps()))

    def restore(self, folder: Path, readings: list[dict[str, float]]) -> None:
        self._clear()
        for row in readings:
            self._add(row)
        if not (folder / KEPT).is_file():
            return
        tensors = load_file(folder / KEPT)
        with safe_open(folder / KEPT, framework="pt") as handle:
            steps = handle.metadata()
        for index, step in steps.items():
            mine = {k.partition("|")[2]: t for k, t in tensors.items() if k.partition("|")[0] == index}
            self.kept[int(index)] = (int(step), mine)

    def _steps(self) -> Iterator[tuple[str, str]]:
        return ((str(index), str(step)) for index, (step, _) in self.kept.items())
