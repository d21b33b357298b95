"""Run a function in its own process, so that the memory of other variants does not count.

    alone("benchmarks.loss:measure", variant="naive", tokens=512)

The function takes and returns JSON values. On a CPU the process may use 90 % of the free memory: a variant that needs
more fails by itself, and the machine survives.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import forked
from ema_scale.core.errors import UserError

OUT_OF_MEMORY = "out of memory"


def alone(target: str, **arguments: Any) -> dict[str, Any] | None:
    """The value of `module:function(**arguments)`; None if it ran out of memory.

    Raises UserError if it fails.
    """
    context: Any = multiprocessing.get_context(forked.start_method())
    environment = {**os.environ, **forked.HEAP}
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", errors="replace") as written:
        process = context.Process(target=_work, args=(sender, written.name, environment, target, json.dumps(arguments)))
        # Some variables are read when a process starts, which is before it can set them.
        with patch.dict(os.environ, environment):
            process.start()
        sender.close()
        try:
            found = json.loads(receiver.recv())
        except EOFError as error:
            process.join()
            raise UserError(f"{target} failed:\n{written.read()[-3000:]}") from error
    process.join()
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


def _work(sender: Any, output: str, environment: dict[str, str], target: str, arguments: str) -> None:
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    forked.take_environment(environment)
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
    sender.send(json.dumps(found))
