"""Deciding alike on every process: where each decides by itself, one takes another way and the rest wait for it.

What one process sees is not what another sees: a signal that it got, a folder on its node, a rounding.
"""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def world_size() -> int:
    """Processes of this run."""
    import torch.distributed as dist

    return int(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this is the main process."""
    import torch.distributed as dist

    return world_size() == 1 or dist.get_rank() == 0


def broadcast_from_main(value: T) -> T:
    """What the main process has. A collective."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    found: T = held[0]
    return found


def any_rank(wish: bool) -> bool:
    """Whether it is so on any process. A collective."""
    if world_size() == 1:
        return wish
    import torch.distributed as dist

    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, bool(wish))
    return any(held)
