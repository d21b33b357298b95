"""Which GPUs and cores there are, and how many an engine takes. Importing this module does not load torch."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError

log = logging.getLogger(__name__)
_CGROUP = Path("/sys/fs/cgroup")
# Version 2, and version 1.
CGROUP_QUOTAS = ((_CGROUP / "cpu.max",), (_CGROUP / "cpu/cpu.cfs_quota_us", _CGROUP / "cpu/cpu.cfs_period_us"))
CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def engine_gpus(engine: Mapping[str, Any], where: str) -> int:
    """tensor_parallel_size x pipeline_parallel_size.

    where: the field, for the message. Raises UserError if they are no numbers of GPUs.
    """
    product = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = engine.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{where}.{name}: found {size!r}, expected a number of GPUs")
        product *= size
    return product


def free_cores() -> int:
    """Cores that this process may use: its affinity, within its control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _quota() or allowed)


def idle_cores() -> int:
    """Those of `free_cores` that are idle while this process waits for a second; at least 1.

    The load average would count what this process has just ended: a training, before its evaluation.
    """
    import psutil

    idle = (os.cpu_count() or 1) * (1 - psutil.cpu_percent(interval=1) / 100)
    return max(1, min(free_cores(), round(idle)))


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16, by its flags on Linux."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return bool(BFLOAT16_FLAGS & set(flags.split()))


def cpu_dtype(config: Any) -> str:
    """What a model computes in on this CPU, by its transformers config.

    bfloat16 where the CPU computes in it, unless the checkpoint is in float32; else float32.
    """
    own = str(getattr(config.get_text_config(), "dtype", None) or "").removeprefix("torch.")
    return "bfloat16" if own in ("bfloat16", "float16") and has_bfloat16() else "float32"


@functools.cache
def warn_if_emulated(dtype: str) -> None:
    """Log once that a CPU that is to compute in this dtype has to emulate it."""
    if dtype == "bfloat16" and not has_bfloat16():
        log.warning("model.dtype: this CPU emulates bfloat16, which takes several times as long; leave it at auto")


def _quota() -> int | None:
    """Cores of the control group, rounded up; None without a limit."""
    for files in CGROUP_QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # not there; or "max", no limit
            quota, period = map(int, " ".join(file.read_text(encoding="ascii") for file in files).split())
            return max(1, math.ceil(quota / period)) if quota > 0 else None
    return None


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]


def one_of(processes: int, number: int, gpus: list[str], each: int = 1) -> dict[str, str]:
    """The environment of process `number` of so many on this machine: its GPUs, or its share of the cores.

    gpus: `visible_gpus`; each: how many a process takes. OMP_NUM_THREADS, where it is set, stays.
    """
    if gpus:
        first = number * each % len(gpus)
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + each])}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, free_cores() // processes))}
