"""Gradients that defenses have formed apart from the rest of the loss, and join themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ema_scale.defenses.gradients import cosine
from ema_scale.defenses.row_groups import RowGroups


class ApartGradients:
    """The gradients of the terms of each defense that joins gradients, summed over a step's micro-batches.

    They are formed by a backward pass of their own, before that of the rest. No hook of DDP sees it, so processes are
    averaged when the step is complete.
    """

    def __init__(self, row_groups: RowGroups) -> None:
        self._names = [row_groups.name_of(i) for i in row_groups.joining]
        self._joining = [row_groups.defenses[i] for i in row_groups.joining]
        self._own: list[list[Tensor]] = []

    def add(self, model: Any, losses: Sequence[Tensor]) -> None:
        """losses: this micro-batch's loss of each defense's terms. Keeps the graph for the rest."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if not self._own:
            self._own = [[torch.zeros_like(p) for p in trained] for _ in losses]
        for total, loss in zip(self._own, losses, strict=True):
            if loss.requires_grad:  # a micro-batch may hold none of its tokens
                found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
                for into, gradient in zip(total, found, strict=True):
                    if gradient is not None:
                        into += gradient

    @torch.no_grad()
    def join(self, model: Any, sum_over_ranks: Callable[[Tensor], Tensor], processes: int) -> dict[str, Tensor]:
        """Put the joined gradient of a whole step in place. A collective.

        Returns name -> reading: for each defense the cosine of its own gradient and of the rest, as far as joined.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        rest: Sequence[Tensor] = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        readings = {}
        own_gradients, self._own = self._own, []
        for name, defense, own in zip(self._names, self._joining, own_gradients, strict=True):
            if processes > 1:
                whole = sum_over_ranks(torch.cat([gradient.flatten() for gradient in own])) / processes
                own = [
                    part.view_as(p) for part, p in zip(whole.split([p.numel() for p in trained]), trained, strict=True)
                ]
            readings[f"{name}_cosine"] = cosine(rest, own)
            rest = defense.join_gradients(rest, own)
        for parameter, gradient in zip(trained, rest, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        return readings
