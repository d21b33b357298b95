"""Log-likelihoods of labels from logits, and what a measure of them gives: its value and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_scale.defenses.terms import LabelLogProbs, LabelMeasure
from ema_scale.models.hooks import unchanged_when_saved
from ema_scale.training.divergence import softmax


def label_log_probs(logits: Tensor, ref_logits: Tensor | None, logz: Tensor, labels: Tensor) -> LabelLogProbs:
    """The log-likelihoods of labels [C, 1]; NaN for the reference's if it is not there."""
    at_label = logits.gather(1, labels)
    policy = (at_label - logz).squeeze(1)
    if ref_logits is None:
        unread = torch.full_like(policy, torch.nan)
        return LabelLogProbs(policy, unread, unread)
    ref_at_label = ref_logits.gather(1, labels)
    ref_logz = softmax(ref_logits).logz
    log_ratio = at_label - ref_at_label - (logz - ref_logz)
    return LabelLogProbs(policy, (ref_at_label - ref_logz).squeeze(1), log_ratio.squeeze(1))


def label_value(measure: LabelMeasure, found: LabelLogProbs, *, backward: bool) -> tuple[Tensor, Tensor | None]:
    """The measure [C], and its derivative [C] by the policy's log-likelihood."""
    if not backward:
        return measure(found), None
    # Both depend on the policy's log-likelihood with derivative 1.
    leaves = (found.policy.requires_grad_(), found.log_ratio.requires_grad_())
    with torch.enable_grad(), unchanged_when_saved():
        value = measure(found)
        by_leaf = torch.autograd.grad(value.sum(), leaves, allow_unused=True) if value.requires_grad else ()
    slope = sum((x for x in by_leaf if x is not None), torch.zeros_like(found.policy))
    return value.detach(), slope.detach()


def logits_gradient(probs: Tensor, labels: Tensor, slope: Tensor) -> Tensor:
    """slope [C] times the gradient of the log-likelihood of labels [C, 1] by the logits [C, V]: one_hot - probs."""
    slope = slope.unsqueeze(1)
    return (probs * -slope).scatter_add_(1, labels, slope)
