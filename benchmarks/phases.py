"""Where the time of a training step goes: policy, reference, loss, backward, optimizer, the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainerCallback

from ema_scale.core.cuda_timer import Stopwatch
from ema_scale.training import forward
from ema_scale.training.trainer import DefendedTrainer

POLICY, REFERENCE, LOSS, BACKWARD, OPTIMIZER, REST = (
    "policy", "reference's", "loss", "backward", "optimizer", "rest"
)  # fmt: skip
PHASES = (POLICY, REFERENCE, LOSS, BACKWARD, OPTIMIZER, REST)


class Phases(TrainerCallback):
    """Stopwatches around the parts of a DefendedTrainer's step. On CUDA they use events, so nothing waits.

    - policy: the backbone's forward, with penalties on its layers.
    - loss: the head of both streams, and the gradient of the last hidden states, which is computed there.
    - backward: the rest of the gradient, and what checkpointing recomputes. Under DeepSpeed, the optimizer as well.
    """

    def __init__(self, trainer: DefendedTrainer, device: str) -> None:
        self.trainer, self.device = trainer, torch.device(device)
        self.watches = {name: Stopwatch() for name in (POLICY, REFERENCE, LOSS, BACKWARD, OPTIMIZER)}
        self.steps: list[dict[str, float]] = []
        self._step = contextlib.ExitStack()
        trainer.add_callback(self)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While the trainer trains."""
        reference, accelerator = self.trainer.defended.reference, self.trainer.accelerator
        watch = reference.watch
        running = watch.running

        @contextlib.contextmanager
        def both(device: torch.device) -> Iterator[None]:
            with self._running(REFERENCE), running(device):
                yield

        with (
            patch.object(watch, "running", both),
            patch.object(reference, "forward", self._timed(POLICY, reference.forward)),
            patch.object(
                forward, "loss_over_shared_vocabulary", self._timed(LOSS, forward.loss_over_shared_vocabulary)
            ),
            patch.object(accelerator, "backward", self._timed(BACKWARD, accelerator.backward)),
        ):
            yield

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._step.enter_context(self._running(OPTIMIZER))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._step.close()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        spent = {name: watch.take() for name, watch in self.watches.items()}
        spent[POLICY] -= spent[REFERENCE]  # which runs inside
        self.steps.append(spent)

    def of(self, seconds: list[float]) -> list[dict[str, float]]:
        """Phase -> seconds of each of the last steps, which took `seconds`. A reference that never ran is left out."""
        found = self.steps[-len(seconds) :]
        names = [name for name in self.watches if name != REFERENCE or any(step[REFERENCE] for step in found)]
        return [
            {**{name: step[name] for name in names}, REST: whole - sum(step.values())}
            for step, whole in zip(found, seconds, strict=True)
        ]

    def _running(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.watches[name].running(self.device)

    def _timed(self, name: str, what: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._running(name):
                return what(*args, **kwargs)

        return timed
