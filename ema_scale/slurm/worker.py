"""What every process of a launched training runs: `ema train`, whose failure is written down where all can see it.

    torchrun ... -m ema_scale.slurm.worker RECIPE [key=value ...]

A signal (TERM, USR1) ends it with a checkpoint and exit code 0; the run's status then says "stopped", by which
`finished.py` tells it from a run that is done. (A code of its own would have the launcher kill those that still leave.)
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.core.terminal import complain, start_logging
from ema_scale.slurm import failure

log = logging.getLogger(__name__)


def work(arguments: list[str]) -> None:
    from ema_scale.recipe import load_recipe
    from ema_scale.training.run import train

    recipe = load_recipe(arguments[0], arguments[1:])
    run = RunDir(recipe.run_path)
    try:
        train(recipe, run)
    except KeyboardInterrupt:
        log.info("rank %s: stopped by a signal, with a checkpoint", os.environ.get("RANK", "0"))
    except BaseException as error:
        failure.write(run, error)
        raise


def main(arguments: list[str]) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_DFL:  # until the training has its own handlers
            signal.signal(number, signal.SIG_IGN)
    try:
        start_logging()
        work(arguments)
    except UserError as error:
        complain(error)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
