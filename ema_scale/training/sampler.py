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

    kinds: rows that some loss term looks at apart from the others have a number of their own; each kind is then spread
    evenly over the steps, so that every step has its share of it (give or take a row), and a term on it its strength.
    Within a kind the order is as random as without.

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
        kinds: Sequence[int] | None = None,
    ) -> None:
        self.count = count
        self.seed = seed
        self.epoch = epoch
        self.rows_per_step = rows_per_step
        self.lengths = lengths
        self.kinds = kinds

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = self._spread(torch.randperm(self.count, generator=generator).tolist())
        if self.lengths is None:
            return iter(order)
        lengths = self.lengths
        steps: list[list[int]] = []
        pool = 50 * self.rows_per_step
        for start in range(0, self.count, pool):
            rows = self._spread(sorted(order[start : start + pool], key=lambda i: lengths[i], reverse=True))
            steps += [rows[i : i + self.rows_per_step] for i in range(0, len(rows), self.rows_per_step)]
        # A step that is not full must stay last, or it would shift the borders of all steps after it.
        tail = [steps.pop()] if len(steps[-1]) < self.rows_per_step else []
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()] if steps else []
        longest = max(range(len(steps)), key=lambda i: max(lengths[row] for row in steps[i]), default=None)
        if longest:
            steps[0], steps[longest] = steps[longest], steps[0]
        return (row for step in steps + tail for row in step)

    def _spread(self, order: list[int]) -> list[int]:
        """The same rows with each kind in its own order, one of a kind of n after every len(order) / n."""
        if self.kinds is None:
            return order
        members: dict[int, list[int]] = {}
        for row in order:
            members.setdefault(self.kinds[row], []).append(row)
        # The j-th of n stands in the middle of the j-th n-th; the sort is stable, and the order so the same everywhere.
        placed = [((j + 0.5) / len(rows), row) for _, rows in sorted(members.items()) for j, row in enumerate(rows)]
        return [row for _, row in sorted(placed, key=lambda pair: pair[0])]
