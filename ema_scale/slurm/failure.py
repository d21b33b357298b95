"""Which process failed first, and why: each one that fails writes it down beside the run before it dies.

When a rank fails, the others fail a moment later, with messages about a lost connection; a log of 512 processes
hides the one that matters. `python -m ema_scale.slurm.failure BAD_NODES RECIPE` puts it on top of the job's log and
into the run's status, and a node that looks broken into the file BAD_NODES.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.io import atomic_write_json
from ema_scale.core.run_dir import FolderInUse, RunDir

# What a process says that only waited for another one. Words of torch, gloo and NCCL.
_OF_OTHERS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "tcpstore")
# What is said where the machine is at fault, not the run: words of CUDA, of the kernel, and of `torchrun.py`.
_OF_THE_NODE = (
    "killed by", "uncorrectable", "ecc error", "cuda error: unspecified launch failure", "cuda error: unknown error",
    "no cuda-capable device", "cuda driver", "fallen off the bus", "nvlink", "cublas_status_not_initialized",
    "input/output error", "stale file handle", "no space left on device", "cannot allocate memory",
)  # fmt: skip


def node_name() -> str:
    """This node, as Slurm calls it: its host name may be another one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def folder(run: RunDir) -> Path:
    """Where this attempt of this job leaves its failures."""
    job, restarts = os.environ.get("SLURM_JOB_ID", "local"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return run.path / "slurm" / "failures" / f"{job}.{restarts}"


def write(run: RunDir, error: BaseException) -> None:
    """Write down this process's failure; the process calls it itself. Never raises."""
    text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    late = any(word in what.lower() for word in _OF_OTHERS)
    with contextlib.suppress(Exception):  # the failure may be that torch cannot be loaded
        import torch.distributed as dist

        late = late or isinstance(error, dist.DistError)
    record(run, int(os.environ.get("RANK", "0")), what, text, late, in_use=isinstance(error, FolderInUse))


def record(run: RunDir, rank: int, what: str, text: str, late: bool, in_use: bool = False) -> None:
    """rank: of all processes. late: this is the echo of another process's failure. in_use: another job writes to the
    run folder. Never raises."""
    path = folder(run) / f"rank-{rank}.json"
    found = {
        "rank": rank, "host": node_name(), "time": time.time(), "error": what, "text": text, "late": late,
        "in_use": in_use,
    }  # fmt: skip
    with contextlib.suppress(OSError, UserError):
        if not path.exists():
            atomic_write_json(path, found)


def failures(run: RunDir) -> list[dict[str, Any]]:
    """This attempt's failures, the one that most likely brought the others about first."""
    found = [read_json(path) for path in folder(run).glob("rank-*.json")]
    return sorted(found, key=lambda f: (f["late"], f["time"]))


def explain(run: RunDir) -> str:
    """The cause, for the job's log. Also sets the run's status, unless it has finished or another job has it."""
    found = failures(run)
    if not found:
        reason, text = "the processes ended without a word: killed from outside, or never started", ""
    else:
        first = found[0]
        reason, text = f"rank {first['rank']} on {first['host']}: {first['error']}", first["text"]
        world = run.status().processes or 1
        silent = sorted(set(range(world)) - {f["rank"] for f in found})
        if first["late"] and silent:
            named = ", ".join(str(rank) for rank in silent[:10]) + (", ..." if len(silent) > 10 else "")
            reason += f" (waiting for others; rank {named} of {world} said nothing: stopped, killed or cut off)"
    with contextlib.suppress(FolderInUse, OSError):
        if not any(f.get("in_use") for f in found):
            _mark_failed(run, reason)
    others = f"({len(found) - 1} more processes failed after it)\n" if len(found) > 1 else ""
    return f"FAILED: {reason}\n{others}{text.rstrip()}\n"


def _mark_failed(run: RunDir, reason: str) -> None:
    with run.lock():  # this attempt's processes have ended: who holds it now is another job's
        if run.status().state != "finished":
            run.set_status("failed", keep=True, reason=reason)


def bad_node(run: RunDir) -> str | None:
    """The node whose own fault the first failure of this attempt looks like; None if it is the run's."""
    first = next(iter(failures(run)), None)
    if first is None or first["late"] or not any(word in first["error"].lower() for word in _OF_THE_NODE):
        return None
    return str(first["host"])


def main(arguments: list[str]) -> None:
    """arguments: a file that takes the name of a bad node, the recipe, and its overrides."""
    from ema_scale.recipe import load_recipe

    bad_nodes, recipe, *overrides = arguments
    try:
        run = RunDir(load_recipe(recipe, overrides).run_path)
        print(explain(run), end="")
        if (node := bad_node(run)) is not None:
            with open(bad_nodes, "a", encoding="utf-8") as file:
                file.write(f"{node}\n")
    except (UserError, OSError) as error:
        print(f"FAILED: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
