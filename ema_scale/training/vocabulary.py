"""The fused loss where policy and reference pad one vocabulary to different sizes, as models of one family do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ema_scale.reference.anatomy import Head
from ema_scale.training.loss import Fused, Term, fused_loss


def loss_over_shared(
    policy: Tensor,
    reference: Tensor | None,
    head: Head,
    labels: Tensor,
    ce_weights: Tensor,
    terms: Sequence[Term] = (),
    *,
    reference_head: Head,
    **options: Any,
) -> Fused:
    """`fused_loss`, whose terms compare distributions over the tokens that both heads have: over the smaller number of
    rows, which must cover the tokenizer. What lies beyond is padding that no text has. The cross-entropy stays over all
    of the policy's head, so where that is the larger one, its logits are formed twice.
    """
    rows = min(head.weight.shape[0], reference_head.weight.shape[0])
    theirs = _cut(reference_head, rows)
    if rows == head.weight.shape[0]:
        return fused_loss(policy, reference, head, labels, ce_weights, terms, reference_head=theirs, **options)
    learned = fused_loss(policy, None, head, labels, ce_weights, **options)
    if not terms:
        return learned
    none = torch.zeros_like(ce_weights)
    held = fused_loss(policy, reference, _cut(head, rows), labels, none, terms, reference_head=theirs, **options)
    return replace(learned, loss=learned.loss + held.loss, divergences=held.divergences)


def _cut(head: Head, rows: int) -> Head:
    if head.weight.shape[0] == rows:
        return head
    return replace(head, weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])
