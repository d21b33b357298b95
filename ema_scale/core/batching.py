"""Batches of sequences of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def batch_by_length(items: Iterable[Item], length: Callable[[Item], int], batch_tokens: int) -> list[list[Item]]:
    """Batches that have at most `batch_tokens` tokens with padding, or one item.

    The longest items come first: memory runs out at once or never. Items of one length keep their order.
    """
    batches: list[list[Item]] = []
    for item in sorted(items, key=length, reverse=True):
        if not batches or (len(batches[-1]) + 1) * length(batches[-1][0]) > batch_tokens:
            batches.append([])
        batches[-1].append(item)
    return batches
