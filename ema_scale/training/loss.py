"""The fused loss: cross-entropy, divergences and label terms, together with the language-model head.

Policy and reference share the frozen head, so everything follows from their last hidden states. Tokens are
independent: chunk by chunk, logits are formed, read, and turned into the gradient of the hidden states at once
(as in Liger's and Cut Cross-Entropy's fused losses, arXiv 2410.10989 and 2411.09009). No [tokens, vocabulary]
tensor larger than a chunk exists, and backward does not need the head (under ZeRO-3 it is gathered once).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ema_scale.defenses.terms import Direction, LabelLogProbs, LabelMeasure
from ema_scale.models.head import Head, head_logits, head_products, logits_of
from ema_scale.training.chunk_size import default_chunk, live_buffers, tile_tokens
from ema_scale.training.divergence import divergence, softmax
from ema_scale.training.label_values import label_log_probs, label_value, logits_gradient

FromHead = Callable[[Tensor, Head, torch.dtype], Tensor]


@dataclass(frozen=True)
class LossTerm:
    """sum_t weights_t * measure_t over the tokens t where `active` holds.

    weights: [N]; 0 where the term is only measured.
    active: bool [N].
    measure: the direction of a divergence, or a function of the labels' log-likelihoods (see `LabelTerm`).
    temperature: of a divergence; divides both logits.
    reads_reference: whether the measure depends on the reference.
    group: the loss that the term belongs to (see `FusedLoss`).
    per_row: see `LabelTerm`.
    """

    weights: Tensor
    active: Tensor
    measure: Direction | LabelMeasure = "policy_reference"
    temperature: float = 1.0
    reads_reference: bool = True
    group: int = 0
    per_row: bool = False


@dataclass(frozen=True)
class CrossEntropyFactor:
    """A factor on the cross-entropy of the tokens where `active` [N] holds; see `LabelWeight` for the rest."""

    active: Tensor
    measure: LabelMeasure
    per_row: bool = False
    reads_reference: bool = False


@dataclass(frozen=True)
class FusedLoss:
    """Results over N tokens, in nats, float32 (float64 if the policy is).

    losses: [groups], with a gradient each; the rest has none. Group 0 holds the cross-entropy and the terms of group 0,
        every further group its own terms alone.
    ce: [N], 0 where the cross-entropy weight is 0. Factors are left out.
    terms: [number of terms, N], 0 where a term is not active.
    correct: [N], 1 where the likeliest token is the label; 0 where the cross-entropy weight is 0.
    entropy: [N], of the policy; 0 where the cross-entropy weight is 0.
    factors: [N], on the cross-entropy; 0 where its weight is 0.
    """

    losses: Tensor
    ce: Tensor
    terms: Tensor
    correct: Tensor
    entropy: Tensor
    factors: Tensor

    @property
    def loss(self) -> Tensor:
        """Scalar: the sum of all groups."""
        return self.losses.sum()


def fused_loss(
    policy: Tensor,
    reference: Tensor | None,
    head: Head,
    labels: Tensor,
    ce_weights: Tensor,
    terms: Sequence[LossTerm] = (),
    *,
    factors: Sequence[CrossEntropyFactor] = (),
    token_factors: Tensor | None = None,
    row_ids: Tensor | None = None,
    reference_head: Head | None = None,
    chunk: int | None = None,
) -> FusedLoss:
    """sum_t ce_weights_t * factors_t * CE_t + the terms, over N tokens. Tokens with no weight and no active term are
    skipped.

    policy: last hidden states [N, H].
    reference: last hidden states [N, H'], taken without a gradient. Needed if a term or factor reads it.
    labels: [N], the token that each position predicts. Read only where ce_weights is not 0 or a label term is active.
    ce_weights: [N].
    factors: made here, of the labels' likelihoods. All multiply.
    token_factors: [N], known beforehand; they multiply with `factors`.
    row_ids: int64 [N], below N: the row of each token, for factors and terms per row.
    reference_head: the reference's head, if it is not the policy's.
    chunk: tokens per chunk. None: `default_chunk`.

    Raises ValueError if a term is given without a reference, or the head is trained (it would get no gradient).
    """
    if reference is None and _reads_reference(terms, factors):
        raise ValueError("a loss term needs the reference's hidden states")
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        raise ValueError("the fused loss gives the head no gradient; freeze it")
    if not chunk:
        slots = 1 + max((term.group for term in terms), default=0) + bool(terms and any(f.per_row for f in factors))
        slots += sum(term.per_row for term in terms)
        reads = any(factor.reads_reference for factor in factors)
        chunk = default_chunk(head.weight, live_buffers(terms, slots=slots, weights_read=reads))
    backward = torch.is_grad_enabled() and policy.requires_grad
    frozen = None if reference is None else reference.detach()
    return FusedLoss(
        *_FusedLossFunction.apply(
            policy, frozen, head, reference_head or head, labels, ce_weights, tuple(terms), chunk, backward,
            (tuple(factors), token_factors, row_ids),
        )
    )  # fmt: skip


def _reads_reference(terms: Sequence[LossTerm], factors: Sequence[CrossEntropyFactor]) -> bool:
    return any(term.reads_reference for term in terms) or any(factor.reads_reference for factor in factors)


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
        factors: tuple[tuple[CrossEntropyFactor, ...], Tensor | None, Tensor | None],
    ) -> tuple[Tensor, ...]:
        sums = _ChunkedLoss(policy, reference, head, reference_head, labels, ce_weights, terms, backward, *factors)
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
        sums.weigh_rows(with_ce)
        losses = [torch.zeros_like(sums.ce[:1].sum()) for _ in range(sums.groups)]
        losses[0] = (sums.ce * ce_weights * sums.factors if sums.weighted else sums.ce * ce_weights).sum()
        for index, term in enumerate(terms):
            value = (sums.values[index] * torch.where(term.active, term.weights, 0)).sum()
            losses[term.group] = losses[term.group] + value
        ctx.save_for_backward(*(sums.gradients or ()), *sums.scales)
        ctx.groups = sums.slot_groups if backward else ()
        results = (sums.ce, sums.values, sums.correct, sums.entropy, sums.factors)
        ctx.mark_non_differentiable(*results)
        return torch.stack(losses), *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        slots = len(ctx.groups)
        gradients, scales = ctx.saved_tensors[:slots], ctx.saved_tensors[slots:]
        total: Tensor | None = None
        for group, gradient, scale in zip(ctx.groups, gradients, scales, strict=True):
            part = (gradient * (scale * upstream[group]).unsqueeze(1)).to(gradient.dtype)
            total = part if total is None else total + part
        return (total, *(None,) * 9)


class _ChunkedLoss:
    """What the chunks of one call share: they read the inputs and write results. A chunk's own tensors are gone before
    the next chunk begins.

    gradients: by slot [N, H], without `scales` [N]: powers of two about as large as the row's weights. A weight of one
    in thousands of tokens would vanish in float16 before a gradient scaler could help. There is one slot for each
    group. If factors per row, which are known at the end only, multiply the cross-entropy, it has a slot of its own; so
    has each term per row, whose gradient is that of the log-likelihoods until then.
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
        factors: tuple[CrossEntropyFactor, ...],
        token_factors: Tensor | None,
        row_ids: Tensor | None,
    ) -> None:
        self.policy, self.reference, self.labels = policy, reference, labels
        self.head, self.reference_head = head, reference_head
        self.ce_weights, self.terms, self.row_ids = ce_weights, terms, row_ids
        self.token_factors = token_factors
        self.by_token = tuple(factor for factor in factors if not factor.per_row)
        self.by_row = tuple(factor for factor in factors if factor.per_row)
        self.weighted = bool(factors) or token_factors is not None
        self.dtype = torch.promote_types(policy.dtype, torch.float32)
        self.ce = torch.zeros(policy.shape[0], dtype=self.dtype, device=policy.device)
        self.correct, self.entropy, self.factors = (torch.zeros_like(self.ce) for _ in range(3))
        self.values = torch.zeros(len(terms), *self.ce.shape, dtype=self.dtype, device=policy.device)
        self.groups = 1 + max((term.group for term in terms), default=0)
        own = int(bool(self.by_row and terms))  # whether the cross-entropy has a slot of its own
        by_row = [index for index, term in enumerate(terms) if term.per_row]
        self.row_terms = {index: slot for slot, index in enumerate(by_row, start=self.groups + own)}
        self.term_slots = tuple(self.row_terms.get(index, term.group + own) for index, term in enumerate(terms))
        shared = [max(0, slot - own) for slot in range(self.groups + own)]
        self.slot_groups = (*shared, *(terms[index].group for index in by_row))
        self.scales = [torch.zeros_like(self.ce) for _ in self.slot_groups]
        self.gradients = [torch.zeros_like(policy) for _ in self.slot_groups] if backward else None
        self.moves = [backward and bool(term.weights.any()) for term in terms]  # else it is only measured
        self.reads_reference = _reads_reference(terms, factors)
        # Of the labels, for factors per row.
        self.label_reference, self.log_ratio = (torch.full_like(self.ce, torch.nan) for _ in range(2))
        # policy, reference and log ratio [3, N] of the labels, for terms per row.
        self.row_labels = {index: self.ce.new_zeros(3, len(self.ce)) for index in self.row_terms}

    def run_chunk(self, rows: Tensor, has_ce: bool) -> None:
        """Tokens `rows` [C] of the batch: a cross-entropy if `has_ce`, and all terms. `live_buffers` counts the [C, V]
        tensors that are alive here."""
        tile = tile_tokens(self.head.weight, self.dtype)
        if tile < len(rows):
            grads = self._read_by_tiles(tile, rows, has_ce)
        else:
            grads = self._read(rows, *self._of_both(head_logits, rows), has_ce)
        for slot in range(len(grads)):
            grad_logits, grads[slot] = grads[slot], None
            if grad_logits is not None:
                assert self.gradients is not None
                into = self.gradients[slot]
                into[rows] = torch.mm(grad_logits.to(self.head.weight.dtype), self.head.weight).to(into.dtype)

    def _read_by_tiles(self, tile: int, rows: Tensor, has_ce: bool) -> list[Tensor | None]:
        """As `_read`, so many tokens at a time. The first gradient takes the place of the policy's products."""
        products, ref_products = self._of_both(head_products, rows)
        grads: list[Tensor | None] = [None for _ in self.slot_groups]
        for at in (slice(start, start + tile) for start in range(0, len(rows), tile)):
            logits = logits_of(products[at], self.head, self.dtype)
            ref_logits = None if ref_products is None else logits_of(ref_products[at], self.reference_head, self.dtype)
            for slot, found in enumerate(self._read(rows[at], logits, ref_logits, has_ce)):
                if found is not None:
                    whole = grads[slot]
                    if whole is None:
                        whole = grads[slot] = products if slot == 0 else torch.empty_like(products)
                    whole[at] = found
        return grads

    def _of_both(self, through: FromHead, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """[C, V] of policy and, if it is read, reference."""
        ref = None
        if self.reads_reference:
            assert self.reference is not None
            ref = through(self.reference[rows], self.reference_head, self.dtype)
        return through(self.policy[rows], self.head, self.dtype), ref

    def _read(self, rows: Tensor, logits: Tensor, ref_logits: Tensor | None, has_ce: bool) -> list[Tensor | None]:
        """By slot the gradient of tokens `rows` [C] by the head's products [C, V], if there is one. Both logits [C, V]
        may be overwritten."""
        backward = self.gradients is not None
        known = softmax(logits)
        probs, logz, top = known

        weight = self.ce_weights[rows].to(self.dtype)
        if has_ce:
            target = self.labels[rows].unsqueeze(1)
            self.ce[rows] = (logz - logits.gather(1, target)).squeeze(1)
            self.correct[rows] = (top == target).squeeze(1).to(self.dtype)
            self.entropy[rows] = logz.squeeze(1) - (probs * logits).sum(1)
            if self.weighted:
                weight = weight * self._factors(rows, logits, ref_logits, logz, target)

        # All weights of a token are divided by one power of two, which backward multiplies in again.
        actives = [term.active[rows] for term in self.terms]
        term_weights = [
            torch.where(a, t.weights[rows], 0).to(self.dtype) for a, t in zip(actives, self.terms, strict=True)
        ]
        slots = range(len(self.slot_groups))
        by_slot = [[w for w, s in zip(term_weights, self.term_slots, strict=True) if s == slot] for slot in slots]
        by_slot[0] = [weight, *by_slot[0]]
        scales = [self._scale(weights or [torch.zeros_like(weight)]) for weights in by_slot]
        for slot in slots:
            self.scales[slot][rows] = scales[slot]

        grads: list[Tensor | None] = [None for _ in slots]
        for index, (term, active, factor) in enumerate(zip(self.terms, actives, term_weights, strict=True)):
            if isinstance(term.measure, str):
                assert ref_logits is not None
                value, grad = divergence(
                    logits, ref_logits, term.measure, term.temperature, known, backward=self.moves[index],
                    overwrite=index == len(self.terms) - 1,
                )  # fmt: skip
            else:
                seen = torch.where(active, self.labels[rows], 0).unsqueeze(1)
                found = label_log_probs(logits, ref_logits if term.reads_reference else None, logz, seen)
                if term.per_row:
                    self.row_labels[index][:, rows] = torch.stack([found.policy, found.reference, found.log_ratio])
                    value, slope = torch.zeros_like(found.policy), torch.ones_like(found.policy) if backward else None
                else:
                    value, slope = label_value(term.measure, found, backward=backward)
                grad = None if slope is None else logits_gradient(probs, seen, slope)
            self.values[index, rows] = torch.where(active, value, 0)
            if grad is not None:
                slot = self.term_slots[index]
                factor = (factor / scales[slot]).unsqueeze(1)
                earlier = grads[slot]
                grads[slot] = grad.mul_(factor) if earlier is None else earlier.addcmul_(grad, factor)
            del grad
        if self.gradients is None:
            return grads

        if has_ce:  # the gradient of the cross-entropy is probs - one_hot(target)
            weight = (weight / scales[0]).unsqueeze(1)
            first = grads[0]
            first = probs.mul_(weight) if first is None else first.addcmul_(probs, weight)
            grads[0] = first.scatter_add_(1, target, -weight)
        del known, probs, ref_logits
        if self.head.softcap is not None:  # the derivative of the cap, in place of the logits
            logits.div_(self.head.softcap).square_().neg_().add_(1)
        for grad in grads:
            if grad is not None and self.head.softcap is not None:
                grad.mul_(logits)
            if grad is not None and self.head.scale != 1.0:
                grad.mul_(self.head.scale)
        return grads

    def weigh_rows(self, with_ce: Tensor) -> None:
        """Multiply in what is made of whole rows, when the likelihoods of all tokens are known."""
        for index, slot in self.row_terms.items():
            term = self.terms[index]
            assert not isinstance(term.measure, str)
            labels = self._row_means(term.active, *self.row_labels[index])
            value, slope = label_value(term.measure, labels, backward=self.gradients is not None)
            self.values[index] = torch.where(term.active, value, 0)
            if slope is not None:
                self.scales[slot] *= torch.where(term.active, slope, 0)
        if not self.by_row:
            return
        found = self._row_means(with_ce, -self.ce, self.label_reference, self.log_ratio)
        for factor in self.by_row:
            values = torch.where(factor.active & with_ce, factor.measure(found), 1).to(self.dtype)
            self.factors *= values
            self.scales[0] *= values

    def _row_means(self, mask: Tensor, *of: Tensor) -> LabelLogProbs:
        """At each token, the means of policy, reference and log ratio [N] over the tokens of its row in `mask`."""
        row_ids = self.row_ids
        assert row_ids is not None
        counts = torch.zeros_like(self.ce).index_add_(0, row_ids, mask.to(self.dtype)).clamp_min(1)
        sums = (torch.zeros_like(self.ce).index_add_(0, row_ids, torch.where(mask, values, 0)) for values in of)
        return LabelLogProbs(*((values / counts)[row_ids] for values in sums))

    def _factors(self, rows: Tensor, logits: Tensor, ref_logits: Tensor | None, logz: Tensor, target: Tensor) -> Tensor:
        """[C]: the product of all factors that are known for each token by itself."""
        product = torch.ones_like(logz.squeeze(1))
        if self.token_factors is not None:
            product = self.token_factors[rows].to(self.dtype)
        for factor in self.by_token:
            labels = label_log_probs(logits, ref_logits if factor.reads_reference else None, logz, target)
            product = product * torch.where(factor.active[rows], factor.measure(labels), 1).to(self.dtype)
        if any(factor.reads_reference for factor in self.by_row):
            labels = label_log_probs(logits, ref_logits, logz, target)
            self.label_reference[rows], self.log_ratio[rows] = labels.reference, labels.log_ratio
        self.factors[rows] = product
        return product

    def _scale(self, weights: list[Tensor]) -> Tensor:
        """[C], powers of two: dividing by them rounds nothing."""
        exponent = torch.frexp(torch.stack(weights).abs().amax(0)).exponent
        if self.head.weight.dtype == torch.float16:
            exponent = exponent - 8  # room below, for small probabilities
        return torch.ldexp(torch.ones_like(weights[0]), exponent)
