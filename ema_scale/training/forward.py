"""The defended forward pass: last hidden states in, one scalar loss out, without logits.

It runs inside the model's own `forward`, so that the wrappers around it (DDP, DeepSpeed's engine and its ZeRO-3 hooks,
autocast) see an ordinary forward. Only the argument `defended=` turns it on; any other call, `generate` included, is
the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ema_scale.choices.likelihood import target_likelihoods
from ema_scale.core.errors import UserError
from ema_scale.defenses.row_groups import NamedPenalty
from ema_scale.defenses.terms import LabelWeight, TokenSet, TokenTerm
from ema_scale.models.head import Head, head_logits
from ema_scale.models.hooks import reference_pass
from ema_scale.models.layout import ModelLayout
from ema_scale.models.sharding import gathered
from ema_scale.models.side_adapters import SideAdapters
from ema_scale.reference.base import HiddenStates, Reference
from ema_scale.reference.cached import Cached
from ema_scale.reference.hidden_state_store import RowKeys
from ema_scale.reference.separate import Separate
from ema_scale.training.loss import CrossEntropyFactor, FusedLoss, LossTerm
from ema_scale.training.shared_vocabulary import loss_over_shared_vocabulary
from ema_scale.training.state_reader import PenaltyReader
from ema_scale.training.token_masks import row_ids, targets

LEARNED_TOKENS = TokenSet("assistant")  # those of the cross-entropy

_NOT_FOR_BACKBONE = {
    "labels", "output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"
}  # fmt: skip


@dataclass(frozen=True)
class LossRequest:
    """What to compute for one micro-batch of B rows x T tokens.

    labels: [B, T].
    masks: token set -> bool [B, T].
    step_tokens: token set -> scalar, its tokens in the whole optimizer step on all processes.
    scale: factor on the loss that undoes the mean over processes.
    terms: divergences and label terms, with unique names.
    penalties: with unique names.
    label_weights: factors on the cross-entropy.
    weighing: defenses that weigh tokens.
    groups: name of a term or penalty -> the loss that it belongs to, where that is not the first (see `FusedLoss`).
    drift_layers: layers whose distance to the reference is read.
    keys: where a cached reference finds the rows, if that is known.
    read_on: filled by the forward pass: name of a metric that penalties read -> its tokens.
    """

    labels: Tensor
    masks: Mapping[TokenSet, Tensor]
    step_tokens: Mapping[TokenSet, Tensor]
    scale: float = 1.0
    terms: Sequence[TokenTerm] = ()
    penalties: Sequence[NamedPenalty] = ()
    label_weights: Sequence[LabelWeight] = ()
    weighing: Sequence[NamedPenalty] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    drift_layers: tuple[int, ...] = ()
    keys: RowKeys | None = None
    read_on: dict[str, TokenSet] = field(default_factory=dict)


@dataclass
class CacheRequest:
    """Asks for what a cache of the reference holds of one batch. `states` is then kind -> states [B, T, H].

    They are not returned, since wrappers of forward change the dtype of what is.
    """

    states: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class LikelihoodRequest:
    """Asks for the log-likelihoods of tokens. `likelihoods` is then float32 [B, T], see `target_likelihoods`.

    targets: int64 [B, T].
    use_cache: whether the cache that comes with the inputs is extended.
    """

    targets: Tensor
    use_cache: bool = False
    likelihoods: Tensor | None = None


class DefendedForward:
    """Patches the `forward` of the model that `reference` belongs to; `remove()` undoes it.

    side: the adapters beside the policy's.
    """

    def __init__(self, reference: Reference, side: SideAdapters | None = None) -> None:
        self.reference, self.side = reference, side
        self.layout: ModelLayout = reference.layout
        self._head_checked = False
        self._packing_checked = False
        self._original = self.layout.core.forward
        self.layout.core.forward = self._patched()

    def remove(self) -> None:
        self.layout.core.__dict__.pop("forward", None)

    def _patched(self) -> Any:
        original = self._original

        @functools.wraps(original)  # transformers reads the signature
        def forward(
            *args: Any, defended: LossRequest | CacheRequest | LikelihoodRequest | None = None, **kwargs: Any
        ) -> Any:
            if defended is None:
                return original(*args, **kwargs)
            inputs = {k: v for k, v in kwargs.items() if v is not None and k not in _NOT_FOR_BACKBONE}
            if isinstance(defended, CacheRequest):
                assert isinstance(self.reference, Cached)
                defended.states = self.reference.compute(inputs)
                return {}
            if isinstance(defended, LikelihoodRequest):
                self._read_likelihoods(defended, inputs)
                return {}
            return self._compute_loss(defended, inputs)

        return forward

    def _compute_loss(self, request: LossRequest, inputs: dict[str, Any]) -> dict[str, Any]:
        """{"losses": a scalar per group, "metrics": name -> detached scalar, this micro-batch's share of a mean}."""
        if self.side is not None:
            route(self.side, request.masks)
        reader = PenaltyReader(request, inputs, len(self.layout.layers))
        # Before the policy: under ZeRO-3 a module's last forward must be the one that has a backward.
        own_logits = None if self._head_checked else self._own_logits(inputs)
        states = self._run_policy_and_reference(request, inputs, reader)
        weights = token_weights(request, torch.promote_types(states.policy.dtype, torch.float32))
        factors = reader.token_weights(states)
        fused = self._fused_loss(request, inputs, states, weights, factors, own_logits)
        return assemble_loss(request, fused, weights, reader, states)

    @torch.no_grad()
    def _read_likelihoods(self, request: LikelihoodRequest, inputs: dict[str, Any]) -> None:
        states = self.layout.backbone(**inputs, use_cache=request.use_cache)[0]
        with gathered(self.layout.head_parameters, models=[self.layout.model]):
            request.likelihoods = target_likelihoods(states, request.targets, self.layout.head())

    def _run_policy_and_reference(
        self, request: LossRequest, inputs: dict[str, Any], reader: PenaltyReader
    ) -> HiddenStates:
        if inputs.get("position_ids") is not None and not self._packing_checked:  # the first batches may not be packed
            check_packing(self.layout)
            self._packing_checked = True
        reads_logits = any(one.reads_reference for one in (*request.terms, *request.label_weights))
        return self.reference.forward(
            inputs,
            reader.stored_layers,
            run_reference=bool(reads_logits or reader.stored_layers or reader.layers),
            reader=reader,
            keys=request.keys,
        )

    def _fused_loss(
        self,
        request: LossRequest,
        inputs: dict[str, Any],
        states: HiddenStates,
        weights: Mapping[TokenSet, Tensor],
        factors: Mapping[str, Tensor],
        own_logits: list[OwnLogits] | None,
    ) -> FusedLoss:
        ref_layout = self.reference.head_layout
        layouts = [self.layout] if ref_layout is self.layout else [self.layout, ref_layout]
        terms = [
            LossTerm(
                (term.strength * weights[term.token_set] * factors.get(term.name, 1)).flatten(),
                request.masks[term.token_set].flatten(),
                term.measure,
                term.temperature,
                term.reads_reference,
                request.groups.get(term.name, 0),
                term.per_row,
            )
            for term in request.terms
        ]
        positions = inputs.get("position_ids")
        ce_factors = factors.get("ce")
        # The heads are looked up here and kept nowhere: FSDP2 replaces parameters, and an old one would hold the file
        # that it was read from in memory.
        parameters = [p for layout in layouts for p in layout.head_parameters]
        with gathered(parameters, models=[layout.model for layout in layouts]):
            head = self.layout.head()
            reference_head = head if ref_layout is self.layout else ref_layout.head()
            for own, used in zip(own_logits or (), (head, reference_head), strict=False):
                _check_head(own, used)
            self._head_checked = True
            return loss_over_shared_vocabulary(
                states.policy.flatten(0, 1),
                None if states.reference is None else states.reference.flatten(0, 1),
                head,
                targets(request.labels, positions).flatten(),
                weights[LEARNED_TOKENS].flatten(),
                terms,
                factors=[
                    CrossEntropyFactor(request.masks[w.token_set].flatten(), w.measure, w.per_row, w.reads_reference)
                    for w in request.label_weights
                ],
                token_factors=None if ce_factors is None else ce_factors.flatten(),
                row_ids=row_ids(request.labels, positions).flatten()
                if request.label_weights or any(term.per_row for term in terms)
                else None,
                reference_head=reference_head,
            )

    @torch.no_grad()
    def _own_logits(self, inputs: dict[str, Any]) -> list[OwnLogits]:
        """The first few tokens through the base model's own head, and through that of a second model."""
        few = {"input_ids": inputs["input_ids"][:1, :8], "use_cache": False}
        core = self.layout.core
        with self.layout.frozen(), reference_pass():
            own = [OwnLogits(type(core).__name__, self._original(**few).logits, self.layout.backbone(**few)[0])]
            if isinstance(self.reference, Separate):
                name = type(self.reference.head_layout.core).__name__
                own.append(OwnLogits(name, *self.reference.with_logits(few)))
        return own


def route(side: SideAdapters, masks: Mapping[TokenSet, Tensor]) -> None:
    """Tell the adapters beside the policy's which rows are the task's, and which are theirs to learn."""
    learned = [None if a.learns is None else masks[TokenSet("all", a.learns)] for a in side.adapters]
    side.route(masks[TokenSet("all", "task")], learned)


def token_weights(request: LossRequest, dtype: torch.dtype) -> dict[TokenSet, Tensor]:
    """[B, T] for each token set that the loss covers: 1 / its tokens in the whole step, 0 outside."""
    covered = {LEARNED_TOKENS, *(term.token_set for term in request.terms)}
    return {s: request.masks[s].to(dtype) / request.step_tokens[s].clamp_min(1) for s in covered}


def assemble_loss(
    request: LossRequest,
    fused: FusedLoss,
    weights: Mapping[TokenSet, Tensor],
    reader: PenaltyReader,
    states: HiddenStates,
) -> dict[str, Any]:
    """The fused losses plus all penalties, and this micro-batch's share of every metric."""
    share = weights[LEARNED_TOKENS].flatten()
    metrics = {
        "ce": (fused.ce * share).sum(),
        "accuracy": (fused.correct * share).sum(),
        "entropy": (fused.entropy * share).sum(),
    }
    for term, values in zip(request.terms, fused.terms, strict=True):
        metrics[term.name] = values.sum() / request.step_tokens[term.token_set].clamp_min(1)
    if request.label_weights or request.weighing:
        metrics["ce_weight"] = (fused.factors * share).sum()
    losses = list(fused.losses.unbind())
    losses += [losses[0].new_zeros(()) for _ in range(max(request.groups.values(), default=0) + 1 - len(losses))]
    for name, penalty in reader.values(states).items():
        group = request.groups.get(name, 0)
        losses[group] = losses[group] + penalty
        metrics[name] = penalty.detach()
    metrics["loss"] = torch.stack(losses).detach().sum()
    for name, (tokens, value) in reader.readings().items():
        request.read_on[name], metrics[name] = tokens, value
    return {"losses": [loss * request.scale for loss in losses], "metrics": {**metrics, **reader.drift}}


# ---- checks, made once ----


@dataclass(frozen=True)
class OwnLogits:
    """A model's own logits [1, t, V] of a few tokens, and its last hidden states [1, t, H]."""

    model: str
    logits: Tensor
    hidden: Tensor


@torch.no_grad()
def _check_head(own: OwnLogits, head: Head) -> None:
    """Raises UserError for an architecture that does something else between last hidden state and logits: it would be
    trained on a wrong loss."""
    logits = head_logits(own.hidden[0], head, torch.float32)
    error = (logits - own.logits[0].float()).abs().max() / own.logits.abs().max().clamp_min(1e-6)
    exact = own.logits.dtype == own.hidden.dtype == torch.float32
    if not error < (1e-4 if exact else 3e-2):
        raise UserError(
            f"{own.model} is not supported: its logits are not those of its head on its last hidden state (relative "
            f"difference {error:.2g})"
        )


@torch.no_grad()
def check_packing(layout: ModelLayout) -> None:
    """Raises UserError unless two short rows in one sequence have the hidden states that each has alone.

    Recurrent layers, positions made from the mask (ALiBi) and attention in chunks of absolute position do not.
    """
    config = layout.core.config.get_text_config()
    name = type(layout.core).__name__
    if getattr(config, "attention_chunk_size", None):
        raise UserError(f"training.packing: {name} attends in chunks of absolute position; set it to false")
    device = layout.head_parameters[0].device
    rows = [torch.arange(1, 1 + n, device=device)[None] % config.vocab_size for n in (7, 5)]
    positions = [torch.arange(row.shape[1], device=device)[None] for row in rows]
    with layout.frozen(), reference_pass():
        packed = {"input_ids": torch.cat(rows, 1), "position_ids": torch.cat(positions, 1)}
        together = layout.backbone(**packed, use_cache=False)[0]
        alone = [layout.backbone(input_ids=row, use_cache=False)[0] for row in rows]
    expected = torch.cat(alone, 1)
    error = float((together - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error < (1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2):
        raise UserError(
            f"training.packing: {name} does not keep packed rows apart (relative difference {error:.2g}); set it to "
            "false"
        )
