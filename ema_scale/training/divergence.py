"""Divergences of two rows of logits and their gradients, precise also where policy and reference nearly agree.

Let d = log p - log q. The sum of p d is second order in d, but its terms are first order: a rounding error in the
normalisers shifts every d, and with it the sum, by more than the divergence itself. The sum of p (d + exp(-d) - 1)
is the same number, since p and q both sum to 1, and its terms are second order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ema_scale.defenses.terms import Direction


def softmax(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Probabilities [C, V] of logits / temperature, and the log of their normaliser [C, 1]."""
    p = torch.softmax(logits if temperature == 1.0 else logits / temperature, 1)
    # The largest probability is 1 / sum exp(logit - largest logit).
    return p, logits.amax(1, keepdim=True) / temperature - p.amax(1, keepdim=True).log_()


def divergence(
    logits: Tensor,
    reference_logits: Tensor,
    direction: Direction,
    temperature: float = 1.0,
    known: tuple[Tensor, Tensor] | None = None,
    *,
    backward: bool = True,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """D per token [C] and, if `backward`, its gradient by the policy's logits [C, V]; both exactly 0 if p = q.

    known: the policy's `softmax` at temperature 1.
    overwrite: nothing else needs the reference's logits, so their memory is used.
    """
    p, logz_policy = known if known is not None and temperature == 1.0 else softmax(logits, temperature)
    q, logz_ref = softmax(reference_logits, temperature)
    if direction == "policy_reference":
        del q  # its room is needed
    d = torch.sub(logits, reference_logits, out=reference_logits if overwrite else None)
    if temperature != 1.0:
        d.div_(temperature)
    d.sub_(logz_policy - logz_ref)
    if direction == "policy_reference":
        value, grad = _policy_reference(p, d, backward)
    elif direction == "reference_policy":
        value, grad = _reference_policy(p, q, d, backward)
    else:
        value, grad = _jensen_shannon(p, q, d, backward)
    return value, grad if grad is None or temperature == 1.0 else grad.div_(temperature)


# The functions below may overwrite q and d. Beyond e^EXTREME an exponential overflows, or a probability is too small
# for its product with one. Such a row takes the plain sum, which is then far above its rounding error.
EXTREME = 80


def _policy_reference(p: Tensor, d: Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
    extreme = d.amin(1) < -EXTREME
    precise = torch.neg(d).expm1_().add_(d).mul_(p).sum(1)
    pd = d.mul_(p)
    mean = pd.sum(1)
    # The gradient is p (d - sum p d): with the plain sum, whose shift is that of d.
    grad = pd.addcmul_(p, mean.unsqueeze(1), value=-1) if backward else None
    return torch.where(extreme, mean, precise), grad


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
