"""The fused loss: cross-entropy, divergences and label terms, together with the language-model head.

Policy and reference share the frozen head, so everything follows from their last hidden states. Tokens are
independent: chunk by chunk, logits are formed, read, and turned into the gradient of the hidden states at once
(as in Liger's and Cut Cross-Entropy's fused losses, arXiv 2410.10989 and 2411.09009). No [tokens, vocabulary]
tensor larger than a chunk exists, and backward does not need the head (under ZeRO-3 it is gathered once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ema_scale.defenses.terms import Direction, LabelLogProbs, LabelMeasure
from ema_scale.models.head import Head, head_logits
from ema_scale.training.divergence import divergence, softmax

# Bytes of all [chunk, vocabulary] buffers. With the gradient and the chunk's hidden states this stays well under the
# 2 GB that the loss may take on a GPU. On a CPU a buffer is then about 16 MiB, near the size of the cache.
CUDA_BYTES, CPU_BYTES = 3 * 2**29, 80 * 2**20
# With fewer tokens per chunk, reading the head takes longer than multiplying with it.
MIN_CHUNK_TOKENS = 128
# Buffers of the cross-entropy: the policy's logits and probabilities, and their product for the entropy.
CROSS_ENTROPY = 3


@dataclass(frozen=True)
class LossTerm:
    """sum_t weights_t * measure_t over the tokens t where `active` holds.

    weights: [N]; 0 where the term is only measured.
    active: bool [N].
    measure: the direction of a divergence, or a function of the labels' log-likelihoods (see `LabelTerm`).
    temperature: of a divergence; divides both logits.
    """

    weights: Tensor
    active: Tensor
    measure: Direction | LabelMeasure = "policy_reference"
    temperature: float = 1.0


@dataclass(frozen=True)
class FusedLoss:
    """Results over N tokens, in nats, float32 (float64 if the policy is).

    loss: scalar with a gradient. The rest has none.
    ce: [N], 0 where the cross-entropy weight is 0.
    terms: [number of terms, N], 0 where a term is not active.
    correct: [N], 1 where the likeliest token is the label; 0 where the cross-entropy weight is 0.
    entropy: [N], of the policy; 0 where the cross-entropy weight is 0.
    """

    loss: Tensor
    ce: Tensor
    terms: Tensor
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
    """sum_t ce_weights_t * CE_t + the terms, over N tokens. Tokens with no weight and no active term are skipped.

    policy: last hidden states [N, H].
    reference: last hidden states [N, H'], taken without a gradient. Needed if there are terms.
    labels: [N], the token that each position predicts. Read only where ce_weights is not 0 or a label term is active.
    ce_weights: [N].
    reference_head: the reference's head, if it is not the policy's.
    chunk: tokens per chunk. None: `default_chunk`.

    Raises ValueError if a term is given without a reference, or the head is trained (it would get no gradient).
    """
    if terms and reference is None:
        raise ValueError("a loss term needs the reference's hidden states")
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
        sums = _ChunkedLoss(policy, reference, head, reference_head, labels, ce_weights, terms, backward)
        with_ce = ce_weights != 0
        terms_only = torch.zeros_like(with_ce)
        for term in terms:
            terms_only = terms_only | (term.active & ~with_ce)
        # Tokens with a cross-entropy first, then those that only terms cover: less to do for these.
        chunks = [(rows, True) for rows in with_ce.nonzero().squeeze(1).split(chunk)]
        chunks += [(rows, False) for rows in terms_only.nonzero().squeeze(1).split(chunk)]
        # Autocast would silently choose another dtype for the products below.
        with torch.autocast(policy.device.type, enabled=False):
            for rows, has_ce in chunks:
                if rows.numel():
                    sums.run_chunk(rows, has_ce)
        loss = (sums.ce * ce_weights).sum()
        for index, term in enumerate(terms):
            loss = loss + (sums.values[index] * torch.where(term.active, term.weights, 0)).sum()
        ctx.save_for_backward(sums.gradient, sums.scale)
        ctx.mark_non_differentiable(sums.ce, sums.values, sums.correct, sums.entropy)
        return loss, sums.ce, sums.values, sums.correct, sums.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient, scale = ctx.saved_tensors
        return ((gradient * (scale * upstream).unsqueeze(1)).to(gradient.dtype), *(None,) * 8)


class _ChunkedLoss:
    """What the chunks of one call share: they read the inputs and write results. A chunk's own tensors are gone before
    the next chunk begins.

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
        self.values = torch.zeros(len(terms), *self.ce.shape, dtype=self.dtype, device=policy.device)
        self.gradient = torch.zeros_like(policy) if backward else None

    def run_chunk(self, rows: Tensor, has_ce: bool) -> None:
        """Tokens `rows` [C] of the batch: a cross-entropy if `has_ce`, and all terms. `live_buffers` counts the [C, V]
        tensors that are alive here."""
        backward = self.gradient is not None
        logits = head_logits(self.policy[rows], self.head, self.dtype)
        probs, logz = softmax(logits)

        # All weights of a token are divided by one power of two, which backward multiplies in again.
        actives = [term.active[rows] for term in self.terms]
        factors = [torch.where(a, t.weights[rows], 0).to(self.dtype) for a, t in zip(actives, self.terms, strict=True)]
        weight = self.ce_weights[rows].to(self.dtype)
        scale = self._scale([weight, *factors])
        self.scale[rows] = scale

        if has_ce:
            target = self.labels[rows].unsqueeze(1)
            self.ce[rows] = (logz - logits.gather(1, target)).squeeze(1)
            self.correct[rows] = (logits.argmax(1) == target.squeeze(1)).to(self.dtype)
            self.entropy[rows] = logz.squeeze(1) - (probs * logits).sum(1)

        ref_logits = None
        if self.terms:
            assert self.reference is not None
            ref_logits = head_logits(self.reference[rows], self.reference_head, self.dtype)
        grad_logits: Tensor | None = None
        for index, (term, active, factor) in enumerate(zip(self.terms, actives, factors, strict=True)):
            assert ref_logits is not None
            if isinstance(term.measure, str):
                value, grad = divergence(
                    logits, ref_logits, term.measure, term.temperature, (probs, logz), backward=backward,
                    overwrite=index == len(self.terms) - 1,
                )  # fmt: skip
            else:
                seen = torch.where(active, self.labels[rows], 0).unsqueeze(1)
                value, grad = _label_value(term.measure, logits, ref_logits, probs, logz, seen, backward)
            self.values[index, rows] = torch.where(active, value, 0)
            if grad is not None:
                factor = (factor / scale).unsqueeze(1)
                grad_logits = grad.mul_(factor) if grad_logits is None else grad_logits.addcmul_(grad, factor)
            del grad
        if self.gradient is None:
            return

        if has_ce:  # the gradient of the cross-entropy is probs - one_hot(target)
            weight = (weight / scale).unsqueeze(1)
            grad_logits = probs.mul_(weight) if grad_logits is None else grad_logits.addcmul_(probs, weight)
            grad_logits.scatter_add_(1, target, -weight)
        if grad_logits is not None:
            del probs, ref_logits
            self.gradient[rows] = _grad_hidden(grad_logits, logits, self.head).to(self.gradient.dtype)

    def _scale(self, weights: list[Tensor]) -> Tensor:
        """[C], powers of two: dividing by them rounds nothing."""
        exponent = torch.frexp(torch.stack(weights).abs().amax(0)).exponent
        if self.head.weight.dtype == torch.float16:
            exponent = exponent - 8  # room below, for small probabilities
        return torch.ldexp(torch.ones_like(weights[0]), exponent)


def _grad_hidden(grad_logits: Tensor, logits: Tensor, head: Head) -> Tensor:
    """Gradient by the hidden states [C, H], from that by the logits [C, V]. Overwrites both arguments."""
    if head.softcap is not None:
        grad_logits.mul_(logits.div_(head.softcap).square_().neg_().add_(1))
    if head.scale != 1.0:
        grad_logits.mul_(head.scale)
    return torch.mm(grad_logits.to(head.weight.dtype), head.weight)


def _label_value(
    measure: LabelMeasure, logits: Tensor, ref_logits: Tensor, probs: Tensor, logz: Tensor, labels: Tensor,
    backward: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The measure per token [C] on labels [C, 1], and its gradient by the policy's logits [C, V]."""
    at_label, ref_at_label = logits.gather(1, labels), ref_logits.gather(1, labels)
    ref_logz = softmax(ref_logits)[1]
    log_ratio = at_label - ref_at_label - (logz - ref_logz)
    policy, reference, log_ratio = (x.squeeze(1) for x in (at_label - logz, ref_at_label - ref_logz, log_ratio))
    if not backward:
        return measure(LabelLogProbs(policy, reference, log_ratio)), None
    # Both depend on the policy's log-likelihood with derivative 1.
    leaves = (policy.requires_grad_(), log_ratio.requires_grad_())
    # Activation offload would move what is saved here to the CPU and back.
    with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        value = measure(LabelLogProbs(policy, reference, log_ratio))
        by_leaf = torch.autograd.grad(value.sum(), leaves, allow_unused=True) if value.requires_grad else ()
    slope = sum((x for x in by_leaf if x is not None), torch.zeros_like(logz.squeeze(1))).unsqueeze(1)
    # d log p(y) / d logits = one_hot(y) - probs
    return value.detach(), (probs * -slope).scatter_add_(1, labels, slope)


# ---- chunk size ----


def default_chunk(weight: Tensor, terms: Sequence[LossTerm] = ()) -> int:
    """Tokens per chunk for a head `weight` [V, H] and these terms."""
    bytes_each = torch.promote_types(weight.dtype, torch.float32).itemsize
    cuda = weight.device.type != "cpu"
    return chunk_tokens(weight.shape[0], live_buffers(terms), cuda=cuda, bytes_each=bytes_each)


def chunk_tokens(vocabulary: int, buffers: int, *, cuda: bool, bytes_each: int = 4) -> int:
    """Tokens per chunk, if so many [chunk, vocabulary] buffers of `bytes_each` bytes per element are alive at once."""
    return max(MIN_CHUNK_TOKENS, (CUDA_BYTES if cuda else CPU_BYTES) // (vocabulary * bytes_each * buffers))


class Measured(Protocol):
    """What of a term decides its memory."""

    @property
    def measure(self) -> Direction | LabelMeasure: ...
    @property
    def temperature(self) -> float: ...


def live_buffers(terms: Sequence[Measured] = ()) -> int:
    """How many [chunk, vocabulary] buffers `fused_loss` with these terms holds at its highest point."""
    return max([CROSS_ENTROPY, *(_buffers_at(term, i, len(terms)) for i, term in enumerate(terms))])


def _buffers_at(term: Measured, index: int, count: int) -> int:
    """Buffers alive while a term is computed: both logits, the policy's probabilities, the gradient of earlier terms,
    and what the term itself needs."""
    shared, last, heated = 3 + (index > 0), index == count - 1, term.temperature != 1.0
    if not isinstance(term.measure, str):
        return shared + 1  # the reference's probabilities
    if term.measure == "policy_reference":
        # A temporary, and log p - log q, which the last term writes over the reference's logits. At another
        # temperature: both probabilities, and the logits that these are made of.
        return shared + (3 if heated else 1 + (not last))
    return shared + 2 + (not last) + heated  # the reference's probabilities stay


# ---- heads of different vocabulary sizes ----


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
    ce_part = fused_loss(policy, None, head, labels, ce_weights, **options)
    if not terms:
        return ce_part
    none = torch.zeros_like(ce_weights)
    shared = _first_rows(head, rows)
    terms_part = fused_loss(policy, reference, shared, labels, none, terms, reference_head=shared_reference, **options)
    return replace(ce_part, loss=ce_part.loss + terms_part.loss, terms=terms_part.terms)


def _first_rows(head: Head, rows: int) -> Head:
    if head.weight.shape[0] == rows:
        return head
    return replace(head, weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])
