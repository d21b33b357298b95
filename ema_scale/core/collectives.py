"""Collective decisions. A rank that branches on local state (a signal, a folder, a rounding) deadlocks the others."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def world_size() -> int:
    """Number of processes of this run."""
    import torch.distributed as dist

    return int(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this is the main process."""
    import torch.distributed as dist

    return world_size() == 1 or dist.get_rank() == 0


def broadcast_from_main(value: T) -> T:
    """The main process's value, on every process. A collective."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any process. A collective."""
    if world_size() == 1:
        return flag
    import torch.distributed as dist

    flags: list[Any] = [None] * world_size()
    dist.all_gather_object(flags, bool(flag))
    return any(flags)
