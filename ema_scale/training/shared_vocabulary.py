"""The fused loss where the heads of policy and reference have different vocabulary sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ema_scale.models.head import Head
from ema_scale.training.loss import FusedLoss, LossTerm, fused_loss


def loss_over_shared_vocabulary(
    policy: Tensor,
    reference: Tensor | None,
    head: Head,
    labels: Tensor,
    ce_weights: Tensor,
    terms: Sequence[LossTerm] = (),
    *,
    reference_head: Head,
    **options: Any,
) -> FusedLoss:
    """`fused_loss` whose terms compare distributions over the tokens that both heads have.

    These are the first tokens, as many as the smaller head has rows. They must cover the tokenizer: what lies beyond is
    padding that no text has. The cross-entropy is over the policy's whole head, so where that is the larger one, its
    logits are formed twice.
    """
    rows = min(head.weight.shape[0], reference_head.weight.shape[0])
    shared_reference = _first_rows(reference_head, rows)
    if rows == head.weight.shape[0]:
        return fused_loss(
            policy, reference, head, labels, ce_weights, terms, reference_head=shared_reference, **options
        )
    ce_part = fused_loss(policy, reference, head, labels, ce_weights, reference_head=shared_reference, **options)
    if not terms:
        return ce_part
    none = torch.zeros_like(ce_weights)
    shared = _first_rows(head, rows)
    kept: dict[str, Any] = {name: options.get(name) for name in ("chunk", "row_ids")}
    terms_part = fused_loss(policy, reference, shared, labels, none, terms, reference_head=shared_reference, **kept)
    losses = torch.cat([ce_part.losses + terms_part.losses[:1], terms_part.losses[1:]])
    return replace(ce_part, losses=losses, terms=terms_part.terms)


def _first_rows(head: Head, rows: int) -> Head:
    if head.weight.shape[0] == rows:
        return head
    return replace(head, weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])
