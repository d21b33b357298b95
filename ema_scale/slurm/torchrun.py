"""torchrun, with two differences that a job on a cluster needs; its options are torchrun's.

Signals are left to the processes, which save a checkpoint and end by themselves: torchrun would die of USR1 and give
TERM's checkpoint 30 seconds. Slurm tells every process; elsewhere the launcher tells its own. And a process that was
killed (out of memory, say) and could not write down why has it written down for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil

from ema_scale.core.errors import UserError
from ema_scale.core.imports import without_garbage_collection
from ema_scale.core.run_dir import RunDir
from ema_scale.slurm import failure

# How long a node whose processes only lost their connection waits for the node that lost a process to say so: the
# first launcher that ends has all others killed.
_PATIENCE = 3.0
_AGAIN = 5.0


def main(arguments: list[str]) -> None:
    told_by_slurm = "SLURM_JOB_ID" in os.environ
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # What is ignored, the processes inherit until they have handlers of their own.
        signal.signal(number, signal.SIG_IGN if told_by_slurm else _tell_processes)
    _make_cache(os.environ.get("EMA_NODE_CACHE"))
    with without_garbage_collection():
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        # The nodes meet at a fixed address, each with the number that Slurm gave it: names are not looked up.
        torchrun.main(["--signals-to-handle=SIGINT", f"--node-rank={os.environ.get('SLURM_NODEID', '0')}", *arguments])
    except ChildFailedError as error:
        _write_down(error.failures, arguments)
        raise SystemExit(1) from None


def _tell_processes(number: int, frame: Any) -> None:
    def tell() -> None:
        while processes := psutil.Process().children():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            time.sleep(_AGAIN)  # it may still have been starting up

    threading.Thread(target=tell, daemon=True, name="signals").start()


def _make_cache(folder: str | None) -> None:
    """Compiled code is loaded from there, and its name under /tmp can be guessed by anybody on this node."""
    if folder is None:
        return
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise SystemExit(f"ema: {folder} on {failure.node_name()} is somebody else's; set TMPDIR in the site file")


def _write_down(failed: Mapping[int, object], arguments: list[str]) -> None:
    from ema_scale.recipe import load_recipe

    try:
        worker = arguments[arguments.index("ema_scale.slurm.worker") + 1 :]
        run = RunDir(load_recipe(worker[0], worker[1:]).run_path)
    except (UserError, ValueError):
        return  # every process said so itself
    for rank, found in failed.items():
        code = getattr(found, "exitcode", 1)
        if code < 0:
            name = signal.Signals(-code).name
            hint = ": out of memory?" if code == -signal.SIGKILL else ""
            failure.record(run, rank, f"killed by {name}{hint}", "", late=False)
    mine = [f for f in failure.failures(run) if f["rank"] in failed]
    if all(f["late"] for f in mine):
        time.sleep(_PATIENCE)


if __name__ == "__main__":
    main(sys.argv[1:])
