"""How much of what a step computes is padding, by the order in which its rows are batched. Counted, not timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ema_scale.training.dataloading import EpochSampler

RANDOM, INSIDE, ACROSS = "random", "by length inside a step (ours)", "by length over the epoch (group_by_length)"


def draw_lengths(rows: int, median: int, spread: float, longest: int) -> list[int]:
    """Log-normal token counts, as those of chat rows are. spread: standard deviation of their logarithm."""
    generator = torch.Generator().manual_seed(0)
    drawn = median * torch.exp(spread * torch.randn(rows, generator=generator))
    return drawn.round().clamp(4, longest).int().tolist()


def padding_shares(lengths: Sequence[int], batch: int, accumulation: int, processes: int = 1) -> dict[str, float]:
    """Order -> share of all token positions of an epoch that hold padding.

    Processes wait for one another, so that the longest row of all their batches counts for each of them.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    step, together = batch * accumulation * processes, batch * processes

    def ours(by_length: Sequence[int] | None) -> list[int]:
        return list(EpochSampler(len(lengths), seed=0, epoch=lambda: 0, rows_per_step=step, lengths=by_length))

    grouped = get_length_grouped_indices(list(lengths), together, generator=torch.Generator().manual_seed(0))
    orders = {RANDOM: ours(None), INSIDE: ours(lengths), ACROSS: grouped}
    return {name: 1 - sum(lengths) / _computed(lengths, order, together) for name, order in orders.items()}


def _computed(lengths: Sequence[int], order: Sequence[int], together: int) -> int:
    batches = (order[start : start + together] for start in range(0, len(order), together))
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
