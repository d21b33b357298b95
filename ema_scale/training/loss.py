"""Cross-entropy and divergences to a frozen reference, fused with the language-model head.

Policy and reference share the frozen head, so everything follows from their last hidden states. Tokens are
independent: chunk by chunk, logits are formed, read, and turned into the gradient of the hidden state at once
(as in Liger's and Cut Cross-Entropy's fused losses, arXiv 2410.10989 and 2411.09009). No [tokens, vocabulary]
tensor larger than a chunk exists, and backward needs the head no more (under ZeRO-3 it is gathered once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ema_scale.defenses.base import Direction
from ema_scale.reference.anatomy import Head


@dataclass(frozen=True)
class Term:
    """sum_t weights_t * D(policy_t, reference_t); weights [N], measured where `active` [N] (bool) holds.

    Temperature divides both logits. A weight may be 0 where the divergence is only measured. `ceiling` looks at the
    labels alone: max(0, log policy_t(label_t) - log reference_t(label_t)).
    """

    weights: Tensor
    active: Tensor
    direction: Direction | Literal["ceiling"] = "policy_reference"
    temperature: float = 1.0


@dataclass(frozen=True)
class Fused:
    """loss: scalar with a gradient; the rest without: ce [N], divergences [terms, N], correct [N], entropy
    [N].

    ce, correct (1 where the likeliest token is the label) and entropy are 0 where the cross-entropy weight is
    0, divergences where the term is not active. All in nats, float32 (float64 if the policy is).
    """

    loss: Tensor
    ce: Tensor
    divergences: Tensor
    correct: Tensor
    entropy: Tensor


def fused_loss(
    policy: Tensor,
    reference: Tensor | None,
    head: Head,
    labels: Tensor,
    ce_weights: Tensor,
    terms: Sequence[Term] = (),
    *,
    reference_head: Head | None = None,
    chunk: int | None = None,
) -> Fused:
    """sum_t ce_weights_t * CE_t + the terms, over N tokens.

    policy: [N, H]; reference: [N, H'] without a gradient, needed by terms; labels: [N], the token each position
    predicts, read only where ce_weights [N] is not 0 or a `ceiling` is active. Tokens with no weight and no active term
    are skipped. reference_head: the reference's, where it is not the policy's. chunk: tokens a piece; None: sized to
    the vocabulary and the device.

    Raises ValueError if a term is given without a reference, or the head is trained (it would get no
    gradient).
    """
    if terms and reference is None:
        raise ValueError("a divergence needs the reference's hidden states")
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        raise ValueError("the fused loss gives the head no gradient; freeze it")
    chunk = chunk or default_chunk(head.weight)
    backward = torch.is_grad_enabled() and policy.requires_grad
    frozen = None if reference is None else reference.detach()
    return Fused(
        *_Fused.apply(policy, frozen, head, reference_head or head, labels, ce_weights, tuple(terms), chunk, backward)
    )


def default_chunk(weight: Tensor) -> int:
    """Tokens a chunk: a float32 logits buffer of about 256 MiB on a GPU, 16 MiB (near the cache) on a CPU; but at least
    128, below which reading the head once a chunk takes longer than multiplying with it."""
    elements = 2**22 if weight.device.type == "cpu" else 2**26
    return max(128, elements // weight.shape[0])


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy: Tensor,
        reference: Tensor | None,
        head: Head,
        reference_head: Head,
        labels: Tensor,
        ce_weights: Tensor,
        terms: tuple[Term, ...],
        chunk: int,
        backward: bool,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(policy.dtype, torch.float32)
        count = policy.shape[0]
        ce = torch.zeros(count, dtype=dtype, device=policy.device)
        correct, entropy = torch.zeros_like(ce), torch.zeros_like(ce)
        divergences = torch.zeros(len(terms), count, dtype=dtype, device=policy.device)
        gradient = torch.zeros_like(policy) if backward else None
        with_ce = ce_weights != 0
        others = torch.zeros_like(with_ce)
        for term in terms:
            others = others | (term.active & ~with_ce)
        # Tokens with a cross-entropy first, then those that only divergences cover: less to do for these.
        pieces = [(rows, True) for rows in with_ce.nonzero().squeeze(1).split(chunk)]
        pieces += [(rows, False) for rows in others.nonzero().squeeze(1).split(chunk)]
        # Autocast would silently choose another dtype for the products below.
        with torch.autocast(policy.device.type, enabled=False):
            for rows, labelled in pieces:
                if rows.numel() == 0:
                    continue
                logits = head_logits(policy[rows], head, dtype)
                log_p = logits - torch.logsumexp(logits, 1, keepdim=True)
                p = log_p.exp()
                slope: Tensor | None = None
                if labelled:
                    target = labels[rows].unsqueeze(1)
                    ce[rows] = -log_p.gather(1, target).squeeze(1)
                    correct[rows] = (log_p.argmax(1) == target.squeeze(1)).to(dtype)
                    entropy[rows] = -torch.linalg.vecdot(p, log_p)
                    if backward:
                        weight = ce_weights[rows].to(dtype).unsqueeze(1)
                        slope = (p * weight).scatter_add_(1, target, -weight)
                if terms:
                    assert reference is not None
                    reference_logits = head_logits(reference[rows], reference_head, dtype)
                for index, term in enumerate(terms):
                    active = term.active[rows]
                    factor = torch.where(active, term.weights[rows], 0).to(dtype).unsqueeze(1)
                    if term.direction == "ceiling":
                        seen = torch.where(active, labels[rows], 0).unsqueeze(1)
                        value, local = _above(log_p, p, _log_softmax(reference_logits, 1.0), seen, backward)
                    else:
                        value, local = _divergence(logits, reference_logits, log_p, p, term, backward)
                    divergences[index, rows] = torch.where(active, value, 0)
                    if local is not None:
                        slope = local.mul_(factor) if slope is None else slope.addcmul_(local, factor)
                if gradient is not None and slope is not None:
                    gradient[rows] = _to_hidden(slope, logits, head).to(gradient.dtype)
        loss = (ce * ce_weights).sum()
        for index, term in enumerate(terms):
            loss = loss + (divergences[index] * torch.where(term.active, term.weights, 0)).sum()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(ce, divergences, correct, entropy)
        return loss, ce, divergences, correct, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.to(gradient.dtype), *(None,) * 8)


def head_logits(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Logits [C, V] of hidden states [C, H], in `dtype`, after scale and softcap."""
    hidden = hidden.to(head.weight.dtype)
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        # Tensor cores multiply in half precision and accumulate in float32 anyway: keep what they
        # accumulated.
        logits = torch.mm(hidden, head.weight.t(), out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden, head.weight.t()).to(dtype)
    if head.bias is not None:
        logits += head.bias
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _to_hidden(slope: Tensor, logits: Tensor, head: Head) -> Tensor:
    """Gradient with respect to the hidden states [C, H], from that with respect to the logits [C, V]."""
    if head.softcap is not None:
        slope = slope * (1 - (logits / head.softcap) ** 2)
    if head.scale != 1.0:
        slope = slope * head.scale
    return torch.mm(slope.to(head.weight.dtype), head.weight)


def _divergence(
    logits: Tensor, reference_logits: Tensor, log_p: Tensor, p: Tensor, term: Term, backward: bool
) -> tuple[Tensor, Tensor | None]:
    """D per token [C] and its gradient by the policy's logits [C, V]; both exactly 0 if p = q."""
    temperature = term.temperature
    log_q = _log_softmax(reference_logits, temperature)
    if temperature != 1.0:
        log_p = _log_softmax(logits, temperature)
        p = log_p.exp()
    if term.direction == "reference_policy":
        q = log_q.exp()
        value = torch.linalg.vecdot(q, log_q - log_p)
        local = torch.sub(p, q, out=q).div_(temperature) if backward else None
    elif term.direction == "policy_reference":
        ratio = torch.sub(log_p, log_q, out=log_q)
        value = torch.linalg.vecdot(p, ratio)
        local = ratio.sub_(value.unsqueeze(1)).mul_(p).div_(temperature) if backward else None
    else:
        # log(p/m) = -log1p(expm1(log q - log p) / 2) for m = (p + q) / 2: exactly 0 at p = q. Beyond e^80 the
        # clamp changes only terms multiplied by less than e^-80.
        gap = (log_q - log_p).clamp_(-80, 80)
        over_p = -torch.log1p(torch.expm1(gap) / 2)
        over_q = -torch.log1p(torch.expm1(-gap) / 2)
        forward = torch.linalg.vecdot(p, over_p)
        value = 0.5 * (forward + torch.linalg.vecdot(log_q.exp(), over_q))
        local = over_p.sub_(forward.unsqueeze(1)).mul_(p).mul_(0.5 / temperature) if backward else None
    return value, local


def _above(log_p: Tensor, p: Tensor, log_q: Tensor, labels: Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
    """max(0, log p - log q) of the labels [C, 1], per token [C], and its gradient by the policy's logits [C, V]."""
    gap = (log_p.gather(1, labels) - log_q.gather(1, labels)).squeeze(1)
    if not backward:
        return gap.clamp_min(0), None
    rises = (gap > 0).to(p.dtype).unsqueeze(1)
    return gap.clamp_min(0), (p * -rises).scatter_add_(1, labels, rises)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits / temperature if temperature != 1.0 else logits
    return scaled - torch.logsumexp(scaled, 1, keepdim=True)
