"""What is done between the steps of a DefendedTrainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ema_scale.training.references import after_first_step

if TYPE_CHECKING:
    from ema_scale.training.trainer import DefendedTrainer


class StepHooks(TrainerCallback):
    """Defenses' `step`; a wish to stop, once all processes agree on it, turned into a checkpoint, as steps are whose
    checkpoints are kept; a reference that fell back told about."""

    def __init__(self, trainer: DefendedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for defense in self.trainer.defenses:
            defense.step(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        choice = after_first_step(trainer.defended.reference, trainer.reference_choice)
        if choice != trainer.reference_choice:
            trainer.reference_choice = choice
            trainer.on_reference_changed()
        if trainer.accelerator.num_processes == 1:  # nobody to agree with: not one step more
            trainer.stop_agreed = trainer.stop_wished
        wanted = trainer.stop_agreed or state.global_step in trainer.keep_steps
        trainer.unscheduled = wanted and not control.should_save
        control.should_save |= wanted
        control.should_training_stop |= trainer.stop_agreed
