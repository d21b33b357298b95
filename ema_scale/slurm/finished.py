"""Whether a run has finished, for the batch script: exit code 0, or 3 if it has not.

    python -m ema_scale.slurm.finished RECIPE [key=value ...]

Processes that end well have trained to the end, or were told to stop and have saved a checkpoint.
"""

from __future__ import annotations

import sys
import time

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.core.terminal import complain, start_logging
from ema_scale.core.waiting import waiting

UNFINISHED = 3
# A shared file system may show another node's last write that much later (NFS's acregmax).
_PATIENCE = 60.0


def has_finished(run: RunDir, patience: float = _PATIENCE) -> bool:
    """Whether the run's status says so; seconds of `patience` if it says that the run goes on, which it does not."""
    end = time.monotonic() + patience
    with waiting(f"{run.path} to show the end of its training"):
        while (state := run.status().state) == "running" and time.monotonic() < end:
            time.sleep(0.5)
    return state == "finished"


def main(arguments: list[str]) -> None:
    from ema_scale.recipe import load_recipe

    try:
        start_logging()
        run = RunDir(load_recipe(arguments[0], arguments[1:]).run_path)
    except UserError as error:
        complain(error)
        sys.exit(2)
    sys.exit(0 if has_finished(run) else UNFINISHED)


if __name__ == "__main__":
    main(sys.argv[1:])
