"""Divergences of two rows of logits and their gradients, precise also where policy and reference nearly agree.

Let d = log p - log q. The sum of p d is second order in d, but its terms are first order: a rounding error in the
normalisers shifts every d, and with it the sum, by more than the divergence itself. The sum of p (d + exp(-d) - 1)
is the same number, since p and q both sum to 1, and its terms are second order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ema_scale.defenses.terms import Direction

BLOCK = 128


class Softmax(NamedTuple):
    """probs: [C, V]. logz: [C, 1], the log of the normaliser. top: int64 [C, 1], the first of the largest."""

    probs: Tensor
    logz: Tensor
    top: Tensor


def softmax(logits: Tensor, temperature: float = 1.0) -> Softmax:
    """Of logits / temperature, [C, V]."""
    top = first_largest(logits)
    p = torch.softmax(logits if temperature == 1.0 else logits / temperature, 1)
    # The largest probability is 1 / sum exp(logit - largest logit).
    return Softmax(p, logits.gather(1, top) / temperature - p.gather(1, top).log_(), top)


def first_largest(logits: Tensor) -> Tensor:
    """argmax over [C, V], as int64 [C, 1]: first of each block's maxima, then of that block. On a CPU torch's argmax of
    a long row takes as long as five other passes over it."""
    size = logits.shape[1]
    if size < BLOCK:
        return logits.argmax(1, keepdim=True)
    whole = size - size % BLOCK
    maxima = logits[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    if whole < size:
        maxima = torch.cat([maxima, logits[:, whole:].amax(1, keepdim=True)], 1)
    start = (maxima.argmax(1, keepdim=True) * BLOCK).clamp_max(size - BLOCK)
    chosen = logits.gather(1, start + torch.arange(BLOCK, device=logits.device))
    return start + chosen.argmax(1, keepdim=True)


def divergence(
    logits: Tensor,
    reference_logits: Tensor,
    direction: Direction,
    temperature: float = 1.0,
    known: Softmax | None = None,
    *,
    backward: bool = True,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """D per token [C] and, if `backward`, its gradient by the policy's logits [C, V]; both exactly 0 if p = q.

    known: the policy's `softmax` at temperature 1.
    overwrite: nothing else needs the reference's logits, so their memory is used.
    """
    p, logz, _ = known if known is not None and temperature == 1.0 else softmax(logits, temperature)
    q, logz_ref = None, None
    if direction != "policy_reference":
        q, logz_ref, _ = softmax(reference_logits, temperature)
    d = torch.sub(logits, reference_logits, out=reference_logits if overwrite else None)
    if temperature != 1.0:
        d.div_(temperature)
    if q is None or logz_ref is None:
        value, grad = _policy_reference(p, d, logits, logz, temperature, backward)
    else:
        d.sub_(logz - logz_ref)
        value, grad = (_reference_policy if direction == "reference_policy" else _jensen_shannon)(p, q, d, backward)
    return value, grad if grad is None or temperature == 1.0 else grad.div_(temperature)


# The functions below may overwrite q and d. Beyond e^EXTREME an exponential overflows, or a probability is too small
# for its product with one. Such a row takes the sum as it is defined, which is then far above its rounding error.
EXTREME = 80


def _policy_reference(
    p: Tensor, d: Tensor, logits: Tensor, logz: Tensor, temperature: float, backward: bool
) -> tuple[Tensor, Tensor | None]:
    """d: the difference of the logits, before any normaliser. The reference's is not needed: with d moved so that
    sum p d = 0, D = log sum p exp(-d), and the gradient is p d."""
    d.sub_(torch.mul(p, d).sum(1, keepdim=True))
    value = torch.neg(d).expm1_().add_(d).mul_(p).sum(1).log1p_()
    extreme = d.amin(1) < -EXTREME
    if extreme.any():  # what the reference expects may have no probability left in p
        value[extreme] = (logits[extreme] / temperature - d[extreme]).logsumexp(1) - logz[extreme, 0]
    return value, d.mul_(p) if backward else None


def _reference_policy(p: Tensor, q: Tensor, d: Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
    extreme = d.amax(1) > EXTREME
    precise = torch.expm1(d).sub_(d).mul_(q).sum(1)
    value = torch.where(extreme, -(q * d).sum(1), precise)
    if not backward:
        return value, None
    # p - q without cancelling digits. The shift of d would give it a nonzero sum, which p - q does not have.
    difference = torch.maximum(p, q, out=q).mul_(d.abs().neg_().expm1_()).copysign_(d)
    return value, difference.addcmul_(p, difference.sum(1, keepdim=True), value=-1)


def _jensen_shannon(p: Tensor, q: Tensor, d: Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
    # log(q/m) = -log1p(expm1(d) / 2) for m = (p + q) / 2, and log(p/m) with -d: the shift cancels between the two.
    # Beyond e^80 the clamp changes only terms multiplied by less than e^-80.
    d.clamp_(-80, 80)
    over_q = torch.expm1(d).div_(2).log1p_()
    value = over_q.mul_(q).sum(1)
    del over_q
    over_p = d.neg_().expm1_().div_(2).log1p_().neg_()
    mean = torch.mul(p, over_p, out=q).sum(1)
    value = 0.5 * (mean - value)
    return value, over_p.sub_(mean.unsqueeze(1)).mul_(p).mul_(0.5) if backward else None
