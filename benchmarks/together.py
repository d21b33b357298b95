"""Run a function in several processes that find each other, as torchrun starts a module.

    together("benchmarks.gathered:measure", 2, "two_stream", task.to_dict())

`forked` says how they start.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import forked
from ema_scale.core.errors import UserError

# What torch's launcher tells each process. Everything else comes from the environment of the caller.
_BY_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def together(target: str, processes: int, *arguments: Any, **environment: str) -> tuple[list[Any], str]:
    """Call `module:function(*arguments)` in each process.

    Args:
        target: `module:function`. Each process imports it when its rank is in the environment.
        processes: how many.
        arguments: what can be pickled.
        environment: variables, besides those of this process.

    Returns:
        What the function returned, by rank, and what the processes wrote to standard output and error.

    Raises:
        UserError: a process failed; the message ends with what the processes wrote.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    start = forked.start_method()
    given = {"OMP_NUM_THREADS": "1", **os.environ, **forked.HEAP, **environment}
    if start == "forkserver":
        given.setdefault("DS_ACCELERATOR", "cpu")
    given = {name: value for name, value in given.items() if not name.startswith(_BY_LAUNCHER)}
    with tempfile.TemporaryDirectory(prefix="ema-processes-") as logs:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(uuid.uuid4()), max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method=start,
            logs_specs=DefaultLogsSpecs(logs, redirects=Std.ALL),
        )  # fmt: skip
        try:
            # Some variables are read when a process starts, which is before it can set them.
            with patch.dict(os.environ, given):
                returned = elastic_launch(config, _call)(target, arguments, given)
        except ChildFailedError as error:
            raise UserError(f"{target}: failed on {processes} processes:\n{_written(logs)[-6000:]}") from error
        return [returned[rank] for rank in range(processes)], _written(logs)


def _call(target: str, arguments: tuple[Any, ...], environment: Mapping[str, str]) -> Any:
    forked.take_environment(environment, kept=_BY_LAUNCHER)
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)(*arguments)


def _written(folder: str) -> str:
    files = sorted(path for path in Path(folder).rglob("std*.log"))
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
