"""The order of rows: seeded, the same on any number of processes, and the same again after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Shuffles by (seed, epoch) alone; with `lengths`, rows of one optimizer step have similar lengths.

    Grouping: a random permutation is cut into pools of 50 steps, each pool is sorted by length and cut into
    steps, the steps are shuffled; the step with the longest row comes first, so that memory runs out at once
    or never. transformers' own sampler draws from the global generator, which a resumed second epoch does not
    repeat, and groups by one process's rows, which ties the order to the number of processes.

    rows_per_step: rows of one optimizer step on all processes. epoch: asked at the start of each pass.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        epoch: Callable[[], int],
        rows_per_step: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.count = count
        self.seed = seed
        self.epoch = epoch
        self.rows_per_step = rows_per_step
        self.lengths = lengths

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = torch.randperm(self.count, generator=generator).tolist()
        if self.lengths is None:
            return iter(order)
        lengths = self.lengths
        steps: list[list[int]] = []
        pool = 50 * self.rows_per_step
        for start in range(0, self.count, pool):
            rows = sorted(order[start : start + pool], key=lambda i: lengths[i], reverse=True)
            steps += [rows[i : i + self.rows_per_step] for i in range(0, len(rows), self.rows_per_step)]
        # A step that is not full must stay last, or it would shift the borders of all steps after it.
        tail = [steps.pop()] if len(steps[-1]) < self.rows_per_step else []
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()] if steps else []
        longest = max(range(len(steps)), key=lambda i: lengths[steps[i][0]], default=None)
        if longest:
            steps[0], steps[longest] = steps[longest], steps[0]
        return (row for step in steps + tail for row in step)
