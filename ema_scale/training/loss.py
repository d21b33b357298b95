"""Cross-entropy and divergences to a frozen reference, fused with the language-model head.

Policy and reference share the frozen head, so everything follows from their last hidden states. Tokens are
independent: chunk by chunk, logits are formed, read, and turned into the gradient of the hidden state at once
(as in Liger's and Cut Cross-Entropy's fused losses, arXiv 2410.10989 and 2411.09009). No [tokens, vocabulary]
tensor larger than a chunk exists, and backward needs the head no more (under ZeRO-3 it is gathered once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ema_scale.defenses.base import Direction
from ema_scale.models.head import Head, head_logits
from ema_scale.training.divergence import divergence, softmax


@dataclass(frozen=True)
class LossTerm:
    """sum_t weights_t * D(policy_t, reference_t); weights [N], measured where `active` [N] (bool) holds.

    Temperature divides both logits. A weight may be 0 where the divergence is only measured. `ceiling` looks at the
    labels alone: max(0, log policy_t(label_t) - log reference_t(label_t)).
    """

    weights: Tensor
    active: Tensor
    direction: Direction | Literal["ceiling"] = "policy_reference"
    temperature: float = 1.0


@dataclass(frozen=True)
class FusedLoss:
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
    terms: Sequence[LossTerm] = (),
    *,
    reference_head: Head | None = None,
    chunk: int | None = None,
) -> FusedLoss:
    """sum_t ce_weights_t * CE_t + the terms, over N tokens.

    policy: [N, H]; reference: [N, H'] without a gradient, needed by terms; labels: [N], the token each position
    predicts, read only where ce_weights [N] is not 0 or a `ceiling` is active. Tokens with no weight and no active term
    are skipped. reference_head: the reference's, where it is not the policy's. chunk: tokens a piece; None:
    `default_chunk`.

    Raises ValueError if a term is given without a reference, or the head is trained (it would get no
    gradient).
    """
    if terms and reference is None:
        raise ValueError("a divergence needs the reference's hidden states")
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        raise ValueError("the fused loss gives the head no gradient; freeze it")
    chunk = chunk or default_chunk(head.weight, terms)
    backward = torch.is_grad_enabled() and policy.requires_grad
    frozen = None if reference is None else reference.detach()
    return FusedLoss(
        *_FusedLossFunction.apply(
            policy, frozen, head, reference_head or head, labels, ce_weights, tuple(terms), chunk, backward
        )
    )


def default_chunk(weight: Tensor, terms: Sequence[LossTerm] = ()) -> int:
    """Tokens a chunk, by the head's vocabulary and device and by what the terms hold; see `chunks`."""
    bytes_each = torch.promote_types(weight.dtype, torch.float32).itemsize
    cuda = weight.device.type != "cpu"
    return chunk_tokens(weight.shape[0], live_buffers(terms), cuda=cuda, bytes_each=bytes_each)


class _FusedLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy: Tensor,
        reference: Tensor | None,
        head: Head,
        reference_head: Head,
        labels: Tensor,
        ce_weights: Tensor,
        terms: tuple[LossTerm, ...],
        chunk: int,
        backward: bool,
    ) -> tuple[Tensor, ...]:
        walk = _ChunkedLoss(policy, reference, head, reference_head, labels, ce_weights, terms, backward)
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
                if rows.numel():
                    walk.piece(rows, labelled)
        loss = (walk.ce * ce_weights).sum()
        for index, term in enumerate(terms):
            loss = loss + (walk.divergences[index] * torch.where(term.active, term.weights, 0)).sum()
        ctx.save_for_backward(walk.gradient, walk.scale)
        ctx.mark_non_differentiable(walk.ce, walk.divergences, walk.correct, walk.entropy)
        return loss, walk.ce, walk.divergences, walk.correct, walk.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient, scale = ctx.saved_tensors
        return ((gradient * (scale * upstream).unsqueeze(1)).to(gradient.dtype), *(None,) * 8)


class _ChunkedLoss:
    """What the chunks of one call share: they read the inputs and write results. What one chunk has made is gone before
    the next begins.

    gradient [N, H] is without `scale` [N], a power of two about as large as the row's weights: a weight of one in
    thousands of tokens would vanish in float16 before a gradient scaler could help.
    """

    def __init__(
        self,
        policy: Tensor,
        reference: Tensor | None,
        head: Head,
        reference_head: Head,
        labels: Tensor,
        ce_weights: Tensor,
        terms: tuple[LossTerm, ...],
        backward: bool,
    ) -> None:
        self.policy, self.reference, self.labels = policy, reference, labels
        self.head, self.reference_head = head, reference_head
        self.ce_weights, self.terms = ce_weights, terms
        self.dtype = torch.promote_types(policy.dtype, torch.float32)
        self.ce = torch.zeros(policy.shape[0], dtype=self.dtype, device=policy.device)
        self.correct, self.entropy, self.scale = (torch.zeros_like(self.ce) for _ in range(3))
        self.divergences = torch.zeros(len(terms), *self.ce.shape, dtype=self.dtype, device=policy.device)
        self.gradient = torch.zeros_like(policy) if backward else None

    def piece(self, rows: Tensor, labelled: bool) -> None:
        """Rows [C] of the batch, with a cross-entropy if `labelled`, and with all terms. `chunks.live_buffers` counts
        the [C, V] tensors that are alive here."""
        backward = self.gradient is not None
        logits = head_logits(self.policy[rows], self.head, self.dtype)
        p, normaliser = softmax(logits)
        actives = [term.active[rows] for term in self.terms]
        factors = [torch.where(a, t.weights[rows], 0).to(self.dtype) for a, t in zip(actives, self.terms, strict=True)]
        weight = self.ce_weights[rows].to(self.dtype)
        scale = self._scale([weight, *factors])
        self.scale[rows] = scale
        if labelled:
            target = self.labels[rows].unsqueeze(1)
            self.ce[rows] = (normaliser - logits.gather(1, target)).squeeze(1)
            self.correct[rows] = (logits.argmax(1) == target.squeeze(1)).to(self.dtype)
            self.entropy[rows] = normaliser.squeeze(1) - (p * logits).sum(1)
        other = None
        if self.terms:
            assert self.reference is not None
            other = head_logits(self.reference[rows], self.reference_head, self.dtype)
        slope: Tensor | None = None
        for index, (term, active, factor) in enumerate(zip(self.terms, actives, factors, strict=True)):
            assert other is not None
            if term.direction == "ceiling":
                seen = torch.where(active, self.labels[rows], 0).unsqueeze(1)
                value, local = _above(logits, other, p, normaliser, seen, backward)
            else:
                value, local = divergence(
                    logits, other, term.direction, term.temperature, (p, normaliser), backward=backward,
                    overwrite=index == len(self.terms) - 1,
                )  # fmt: skip
            self.divergences[index, rows] = torch.where(active, value, 0)
            if local is not None:
                factor = (factor / scale).unsqueeze(1)
                slope = local.mul_(factor) if slope is None else slope.addcmul_(local, factor)
            del local
        if self.gradient is None:
            return
        if labelled:
            weight = (weight / scale).unsqueeze(1)
            slope = p.mul_(weight) if slope is None else slope.addcmul_(p, weight)
            slope.scatter_add_(1, target, -weight)
        if slope is not None:
            del p, other
            self.gradient[rows] = _to_hidden(slope, logits, self.head).to(self.gradient.dtype)

    def _scale(self, weights: list[Tensor]) -> Tensor:
        """[C], powers of two, by which nothing is rounded."""
        exponent = torch.frexp(torch.stack(weights).abs().amax(0)).exponent
        if self.head.weight.dtype == torch.float16:
            exponent = exponent - 8  # room below, for small probabilities
        return torch.ldexp(torch.ones_like(weights[0]), exponent)


def _to_hidden(slope: Tensor, logits: Tensor, head: Head) -> Tensor:
    """Gradient with respect to the hidden states [C, H], from that with respect to the logits [C, V]; writes to
    both."""
    if head.softcap is not None:
        slope.mul_(logits.div_(head.softcap).square_().neg_().add_(1))
    if head.scale != 1.0:
        slope.mul_(head.scale)
    return torch.mm(slope.to(head.weight.dtype), head.weight)


def _above(
    logits: Tensor, other: Tensor, p: Tensor, normaliser: Tensor, labels: Tensor, backward: bool
) -> tuple[Tensor, Tensor | None]:
    """max(0, log p - log q) of the labels [C, 1], per token [C], and its gradient by the policy's logits [C, V]."""
    gap = logits.gather(1, labels) - other.gather(1, labels) - (normaliser - softmax(other)[1])
    value = gap.squeeze(1).clamp_min(0)
    if not backward:
        return value, None
    rises = (gap > 0).to(p.dtype)
    return value, (p * -rises).scatter_add_(1, labels, rises)


# With the gradient and the chunk's hidden states, well under the 2 GB that the loss may take on a GPU. On a CPU a
# buffer is then about 16 MiB, near the cache.
CUDA_BYTES, CPU_BYTES = 3 * 2**29, 80 * 2**20


# Below so many tokens, reading the head once a chunk takes longer than multiplying with it.
FEWEST = 128


# Policy's logits and probabilities, and their product for the entropy.
CROSS_ENTROPY = 3


class ChunkRequest(Protocol):
    """What of a divergence decides."""

    @property
    def direction(self) -> str: ...
    @property
    def temperature(self) -> float: ...


def live_buffers(terms: Sequence[ChunkRequest] = ()) -> int:
    """[chunk, vocabulary] buffers at the highest point of `fused_loss` with these terms, besides cross-entropy."""
    return max([CROSS_ENTROPY, *(_held_bytes(term, i, len(terms)) for i, term in enumerate(terms))])


def chunk_tokens(vocabulary: int, buffers: int, *, cuda: bool, bytes_each: int = 4) -> int:
    """Tokens a chunk. bytes_each: of a buffer's elements."""
    return max(FEWEST, (CUDA_BYTES if cuda else CPU_BYTES) // (vocabulary * bytes_each * buffers))


def _held_bytes(term: ChunkRequest, index: int, count: int) -> int:
    """Both streams' logits and the policy's probabilities; what earlier terms have left of the gradient; then what the
    term itself needs."""
    held, last, heated = 3 + (index > 0), index == count - 1, term.temperature != 1.0
    if term.direction == "ceiling":
        return held + 1  # the reference's probabilities
    if term.direction == "policy_reference":
        # A temporary, and log p - log q, which the last term puts where the reference's logits are; at another
        # temperature both streams' probabilities, and the logits that these are made of.
        return held + (3 if heated else 1 + (not last))
    return held + 2 + (not last) + heated  # the reference's probabilities stay


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
