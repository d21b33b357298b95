"""The defended forward pass: last hidden states in, one scalar loss out, without logits.

It runs inside the model's own `forward`, so that the wrappers around it (DDP, DeepSpeed's engine and its
ZeRO-3 hooks, autocast) see an ordinary forward. It is armed only by the argument `defended=`; any other call,
`generate` included, is the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ema_scale.core.errors import UserError
from ema_scale.defenses.base import Divergence, PenaltyInputs
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.models.head import Head, head_logits
from ema_scale.models.hooks import reference_pass
from ema_scale.models.layout import ModelLayout
from ema_scale.models.sharding import gathered
from ema_scale.reference.base import Reference
from ema_scale.reference.cached import Cached, SequenceKeys
from ema_scale.reference.separate import Separate
from ema_scale.training.loss import LossTerm, loss_over_shared_vocabulary
from ema_scale.training.token_masks import scope_masks, segment_ids, targets


@dataclass(frozen=True)
class LossRequest:
    """What one micro-batch is asked for.

    labels: [B, T]. tokens: [scopes], tokens of the whole optimizer step on all processes. factor: what the
    loss is multiplied by, to undo the mean over processes. divergences: with unique names. penalties: name ->
    place of a defense in `parts`. drift_layers: layers whose distance to the reference is read. tags, template: see
    `scope_masks`. texts: for a cached reference, if they are known.
    """

    labels: Tensor
    tokens: Tensor
    factor: float = 1.0
    divergences: Sequence[Divergence] = ()
    penalties: tuple[tuple[str, int], ...] = ()
    drift_layers: tuple[int, ...] = ()
    tags: Tensor | None = None
    template: Tensor | None = None
    parts: RowGroups = field(default_factory=RowGroups)
    texts: SequenceKeys | None = None


@dataclass
class CacheRequest:
    """Asks for what a cache of the reference holds of one batch; `states` is then kind -> states [B, T, H].

    They are not returned, since wrappers of forward change the dtype of what is.
    """

    states: dict[str, Tensor] = field(default_factory=dict)


class DefendedForward:
    """Patches `anatomy.core.forward`; `remove()` undoes it."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.anatomy: ModelLayout = reference.anatomy
        self._head_checked = False
        self._packing_checked = False
        self._original = self.anatomy.core.forward
        self.anatomy.core.forward = self._patched()

    def remove(self) -> None:
        self.anatomy.core.__dict__.pop("forward", None)

    def _patched(self) -> Any:
        original = self._original

        @functools.wraps(original)  # transformers reads the signature
        def forward(*args: Any, defended: LossRequest | CacheRequest | None = None, **kwargs: Any) -> Any:
            if defended is None:
                return original(*args, **kwargs)
            inputs = {k: v for k, v in kwargs.items() if v is not None and k not in _NOT_FOR_BACKBONE}
            if isinstance(defended, CacheRequest):
                assert isinstance(self.reference, Cached)
                defended.states = self.reference.compute(inputs)
                return {}
            return self._run(defended, inputs)

        return forward

    def _run(self, ask: LossRequest, inputs: dict[str, Any]) -> dict[str, Any]:
        """{"loss": scalar, "metrics": name -> detached scalar, this micro-batch's share of a mean}."""
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        positions = inputs.get("position_ids")
        masks = scope_masks(mask, ask.labels, ask.tags, positions, ask.template, ask.parts.tags)
        tokens: dict[str, Tensor] = dict(zip(ask.parts.covers, ask.tokens, strict=True))
        num_layers = len(self.anatomy.layers)
        view = PenaltyInputs({}, {}, mask, ask.labels, masks, tokens, segment_ids(positions))
        penalties = [
            (
                name,
                ask.parts.defenses[i],
                replace(view, masks=ask.parts.view(i, masks), tokens=ask.parts.view(i, tokens)),
            )
            for name, i in ask.penalties
        ]
        wanted = {k for _, defense, _ in penalties for k in defense.layers(num_layers)}
        whole = {k for _, d, _ in penalties if not d.layer_by_layer for k in d.layers(num_layers)}
        parts: dict[str, dict[int, Tensor]] = {name: {} for name, *_ in penalties}
        drift: dict[str, Tensor] = {}

        def keep(layer: int, state: Tensor, base: Tensor | None) -> bool:
            if layer in ask.drift_layers and base is not None:
                drift[f"drift/layer_{layer}"] = view.mean(_relative_distance(state.detach(), base))
            for name, defense, own in penalties:
                if defense.layer_by_layer and base is not None and layer in defense.layers(num_layers):
                    there = replace(own, reference={layer: base})
                    part = eager_gradient(lambda s, d=defense, v=there: d.penalty(replace(v, policy={layer: s})), state)  # type: ignore[misc]
                    if part is not None:
                        parts[name][layer] = part
            return layer in whole

        # Before the policy: under ZeRO-3 a module's last forward must be the one that has a backward.
        expected = None if self._head_checked else self._few_tokens(inputs)
        if positions is not None and not self._packing_checked:  # the first batches may not be packed
            check_packing(self.anatomy)
            self._packing_checked = True
        if isinstance(self.reference, Cached):
            self.reference.texts = ask.texts
        needs_reference = bool(ask.divergences or wanted or ask.drift_layers)
        states = self.reference.streams(
            inputs, sorted(wanted | set(ask.drift_layers)), reference=needs_reference, keep=keep
        )
        dtype = torch.promote_types(states.policy.dtype, torch.float32)
        covered = {"assistant", *(d.cover for d in ask.divergences)}
        weights = {s: masks[s].to(dtype) / tokens[s].clamp_min(1) for s in covered}
        other = self.reference.head_of
        heads = [self.anatomy] if other is self.anatomy else [self.anatomy, other]
        # Looked up here and kept nowhere: FSDP2 replaces parameters, and an old one would hold the file it was read
        # from in memory.
        parameters = [p for anatomy in heads for p in anatomy.head_parameters]
        with gathered(parameters, models=[anatomy.model for anatomy in heads]):
            head = self.anatomy.head()
            reference_head = head if other is self.anatomy else other.head()
            for (logits, hidden, name), used in zip(expected or (), (head, reference_head), strict=False):
                _check_head(logits, hidden, used, name)
            self._head_checked = True
            terms = [
                LossTerm(
                    (d.strength * weights[d.cover]).flatten(),
                    masks[d.cover].flatten(),
                    d.direction,
                    d.temperature,
                )
                for d in ask.divergences
            ]
            fused = loss_over_shared_vocabulary(
                states.policy.flatten(0, 1),
                None if states.reference is None else states.reference.flatten(0, 1),
                head,
                targets(ask.labels, positions).flatten(),
                weights["assistant"].flatten(),
                terms,
                reference_head=reference_head,
            )
        share = weights["assistant"].flatten()
        metrics = {
            "ce": (fused.ce * share).sum(),
            "accuracy": (fused.correct * share).sum(),
            "entropy": (fused.entropy * share).sum(),
        }
        for divergence, values in zip(ask.divergences, fused.divergences, strict=True):
            metrics[divergence.name] = values.sum() / tokens[divergence.cover].clamp_min(1)
        loss = fused.loss
        for name, defense, own in penalties:
            asked = defense.layers(num_layers)
            penalty: Tensor | None
            if defense.layer_by_layer:
                penalty = torch.stack(list(parts[name].values())).sum() if parts[name] else None
            else:
                policy = {k: states.policy_layers[k] for k in asked}
                reference = {k: states.reference_layers[k] for k in asked}
                penalty = defense.penalty(replace(own, policy=policy, reference=reference))
            if penalty is not None:
                loss = loss + penalty
                metrics[name] = penalty.detach()
        metrics["loss"] = loss.detach()
        return {"loss": loss * ask.factor, "metrics": {**metrics, **drift}}

    @torch.no_grad()
    def _few_tokens(self, inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor, str]]:
        """The models' own logits [1, t, V] and last hidden states [1, t, H] on the first few tokens: of the base, and
        of a reference with another head."""
        few = {"input_ids": inputs["input_ids"][:1, :8], "use_cache": False}
        core = self.anatomy.core
        with self.anatomy.frozen(), reference_pass():
            found = [(self._original(**few).logits, self.anatomy.backbone(**few)[0], type(core).__name__)]
            if isinstance(self.reference, Separate):
                found.append((*self.reference.with_logits(few), type(self.reference.other.core).__name__))
        return found


@torch.no_grad()
def _check_head(theirs: Tensor, hidden: Tensor, head: Head, name: str) -> None:
    """Once: an architecture that does something else between last hidden state and logits is refused instead of
    being trained on a wrong loss."""
    ours = head_logits(hidden[0], head, torch.float32)
    error = (ours - theirs[0].float()).abs().max() / theirs.abs().max().clamp_min(1e-6)
    exact = theirs.dtype == hidden.dtype == torch.float32
    if not error < (1e-4 if exact else 3e-2):
        raise UserError(
            f"{name} is not supported: its logits are not those of its head on its last hidden state (relative "
            f"difference {error:.2g})"
        )


_NOT_FOR_BACKBONE = {
    "labels", "output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"
}  # fmt: skip


def _relative_distance(policy: Tensor, reference: Tensor) -> Tensor:
    """||p - r|| / ||r|| per token: [B, T, H] -> [B, T], float32."""
    policy, reference = policy.float(), reference.float()
    norm = torch.linalg.vector_norm(reference, dim=-1)
    return torch.linalg.vector_norm(policy - reference, dim=-1) / norm.clamp_min(1e-12)


@torch.no_grad()
def check_packing(anatomy: ModelLayout) -> None:
    """Two short rows in one sequence must have the hidden states that each has alone.

    Recurrent layers, positions made of the mask (ALiBi) and attention in chunks of absolute position do not. Raises
    UserError then.
    """
    config = anatomy.core.config.get_text_config()
    name = type(anatomy.core).__name__
    if getattr(config, "attention_chunk_size", None):
        raise UserError(f"training.packing: {name} attends in chunks of absolute position; set it to false")
    device = anatomy.head_parameters[0].device
    rows = [torch.arange(1, 1 + n, device=device)[None] % config.vocab_size for n in (7, 5)]
    positions = [torch.arange(row.shape[1], device=device)[None] for row in rows]
    with anatomy.frozen(), reference_pass():
        together = anatomy.backbone(
            input_ids=torch.cat(rows, 1), position_ids=torch.cat(positions, 1), use_cache=False
        )[0]
        alone = [anatomy.backbone(input_ids=row, use_cache=False)[0] for row in rows]
    expected = torch.cat(alone, 1)
    error = float((together - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error < (1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2):
        raise UserError(
            f"training.packing: {name} does not keep packed rows apart (relative difference {error:.2g}); set it to "
            "false"
        )


def eager_gradient(term: Callable[[Tensor], Tensor | None], state: Tensor) -> Tensor | None:
    """term(state): a scalar or None. Of its computation only the gradient, shaped and typed as `state`, is kept for
    backward, where autograd would keep several float32 copies.

    It may be called inside a region of gradient checkpointing: the recomputation in backward, which does not call it,
    need not know.
    """
    leaf = state.detach().requires_grad_(state.requires_grad and torch.is_grad_enabled())
    # Checkpointing counts the tensors that autograd saves inside its region, by hooks; these take their place.
    with saved_tensors_hooks(_eager_same, _eager_same):
        value = term(leaf)
        if value is None or not value.requires_grad:
            return value
        (gradient,) = torch.autograd.grad(value, leaf)
    known: Tensor = _Known.apply(state, value.detach(), gradient)
    return known


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient  # not by save_for_backward, for the same reason
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.gradient * upstream).to(ctx.gradient.dtype), None, None


def _eager_same(tensor: Tensor) -> Tensor:
    return tensor
