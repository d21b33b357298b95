"""Run a function in its own process, so that the memory of other variants does not count.

    alone("benchmarks.loss:measure", variant="naive", tokens=512)

The function takes and returns JSON values. On a CPU the process may use 90 % of the free memory: a variant that needs
more fails by itself, and the machine survives.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError

OUT_OF_MEMORY = "out of memory"


def alone(target: str, **arguments: Any) -> dict[str, Any] | None:
    """The value of `module:function(**arguments)`; None if it ran out of memory.

    Raises UserError if it fails.
    """
    # Without the threshold, freed memory stays in the heap of the process and counts as used.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.alone", target, json.dumps(arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{target} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found == OUT_OF_MEMORY else found


def free_memory() -> int | None:
    """Bytes of memory available on this machine; None where /proc does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _limit() -> None:
    free = free_memory()
    if free is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + int(0.9 * free), resource.RLIM_INFINITY))


def _main(target: str, arguments: str) -> None:
    import torch

    from benchmarks.harness import out_of_memory

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    module, _, name = target.partition(":")
    given = json.loads(arguments)
    if not torch.cuda.is_available():  # CUDA maps far more than it uses
        _limit()
    try:
        found = getattr(import_module(module), name)(**given)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        found = OUT_OF_MEMORY
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
