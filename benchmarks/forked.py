"""How processes are started that need torch and its kin: forked from one that has made the imports, which take seconds.

CUDA does not survive a fork: with a GPU each process makes its own imports.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping

_IMPORTS = ["peft", "deepspeed", "transformers.trainer", "ema_scale.training.trainer", "ema_scale.training.run"]
# Without the threshold, freed memory stays in the heap of a process and counts as used.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def start_method() -> str:
    """Of multiprocessing's: `forkserver`, whose server will have made the imports; `spawn` with a GPU."""
    import torch

    if torch.cuda.is_available():
        return "spawn"
    multiprocessing.set_forkserver_preload(_IMPORTS)
    return "forkserver"


def take_environment(environment: Mapping[str, str], kept: tuple[str, ...] = ()) -> None:
    """In the new process: have these variables, and of others only those that begin with one of `kept`."""
    for name in [name for name in os.environ if not name.startswith(kept)]:
        del os.environ[name]
    os.environ.update(environment)
