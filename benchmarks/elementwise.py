"""Candidates for what the fused loss does to a chunk of logits between its matrix products: cross-entropy, KL(policy,
reference) and the gradient by the logits, in one kernel.

`ema_scale.training.loss` does it with torch's own operations, one pass over [chunk, vocabulary] each. Here the same
loop over chunks takes any function of (logits, reference's logits, labels, weights). One that is not faster on a GPU
has no place here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.loss import Problem
from ema_scale.models.head import Head, head_logits

CHUNK = 1024
EXTREME = 80.0  # as in `training.divergence`

# (logits [C, V], reference's logits [C, V] or None, both float32, labels [C], hard, soft, dtype) -> cross-entropy [C],
# divergence [C], entropy [C], whether the likeliest token is the label [C], gradient by the logits [C, V] in `dtype`.
# hard, soft: what cross-entropy and divergence of a token are multiplied by.
Elementwise = Callable[[Tensor, Tensor | None, Tensor, float, float, torch.dtype], tuple[Tensor, ...]]


def formula(
    logits: Tensor, other: Tensor | None, labels: Tensor, hard: float, soft: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In torch, for torch.compile to fuse."""
    over = torch.logsumexp(logits, 1, keepdim=True)
    p = torch.exp(logits - over)
    ce = (over - logits.gather(1, labels.unsqueeze(1))).squeeze(1)
    entropy = over.squeeze(1) - (p * logits).sum(1)
    correct = logits.argmax(1) == labels
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels.unsqueeze(1)
    slope = hard * torch.where(is_label, p - 1, p)
    value = torch.zeros_like(ce)
    if other is not None:
        d = logits - other - (over - torch.logsumexp(other, 1, keepdim=True))
        pd = p * d
        mean = pd.sum(1)
        precise = (p * (torch.expm1(-d) + d)).sum(1)
        value = torch.where(d.amin(1) < -EXTREME, mean, precise)
        slope = slope + soft * (pd - p * mean.unsqueeze(1))
    return ce, value, entropy, correct, slope.to(dtype)


def by_triton(
    logits: Tensor, other: Tensor | None, labels: Tensor, hard: float, soft: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two passes over a row: its sums, rescaled as larger logits come; then the divergence and the gradient."""
    from benchmarks.triton_rows import BLOCK, rows_kernel

    count, size = logits.shape
    ce, value, entropy, correct = (torch.zeros(count, dtype=torch.float32, device=logits.device) for _ in range(4))
    slope = torch.empty(count, size, dtype=dtype, device=logits.device)
    rows_kernel[(count,)](
        logits, logits if other is None else other, labels, ce, value, entropy, correct, slope, size, hard, soft,
        WITH_REFERENCE=other is not None, BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
    return ce, value, entropy, correct, slope


def loss_by(elementwise: Elementwise) -> Callable[[Problem, Tensor], Tensor]:
    """A way of `bench.loss`: the chunks' loop with this function inside; of KL(policy, reference) alone."""

    def way(problem: Problem, policy: Tensor) -> Tensor:
        if problem.direction != "policy_reference":
            raise ValueError(f"found {problem.direction!r}; only KL(policy, reference) is written")
        return _Chunked.apply(policy, problem, elementwise)

    return way


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, policy: Tensor, problem: Problem, elementwise: Elementwise) -> Tensor:
        head, dtype, count = Head(problem.weight), problem.weight.dtype, len(policy)
        gradient = torch.empty_like(policy)
        total = torch.zeros((), device=policy.device)
        for rows in torch.arange(count, device=policy.device).split(CHUNK):
            logits = head_logits(policy[rows], head, torch.float32)
            other = head_logits(problem.reference[rows], head, torch.float32) if problem.soft else None
            ce, value, _, _, slope = elementwise(logits, other, problem.labels[rows], problem.hard, problem.soft, dtype)
            total += problem.hard * ce.sum() + problem.soft * value.sum()
            gradient[rows] = torch.mm(slope, head.weight)
        ctx.save_for_backward(gradient)
        ctx.count = count
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.count).to(gradient.dtype), None, None
