"""One history per run in TensorBoard and W&B, however often the run is stopped and resumed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from ema_scale.core.hashing import digest
from ema_scale.core.run_dir import RunDir


@contextlib.contextmanager
def logger_environment(run_dir: RunDir) -> Iterator[None]:
    """What transformers' loggers read from the environment. What the user has set stays, and is put back."""
    run = {
        "TENSORBOARD_LOGGING_DIR": str(run_dir.tensorboard),  # TrainingArguments has no field for it
        # The same after a resume, another one if the run starts over or lies elsewhere.
        "WANDB_RUN_ID": digest(str(run_dir.path.resolve()), run_dir.status().started),
        "WANDB_RESUME": "allow",
        "WANDB_NAME": run_dir.path.name,
    }
    before = {name: os.environ.get(name) for name in run}
    os.environ.update({name: value for name, value in run.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
        if (wandb := sys.modules.get("wandb")) is not None and getattr(wandb, "run", None) is not None:
            wandb.finish()  # the next run of this process is another one


def drop_later_steps(trainer: Any, run_dir: RunDir, step: int) -> None:
    """Have TensorBoard forget what an earlier attempt logged after `step`: these steps are about to be done again."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and run_dir.tensorboard.exists():
            from torch.utils.tensorboard import SummaryWriter

            callback.tb_writer = SummaryWriter(str(run_dir.tensorboard), purge_step=step + 1)
