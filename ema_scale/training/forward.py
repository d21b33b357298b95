"""The defended forward pass: last hidden states in, one scalar loss out, without logits.

It runs inside the model's own `forward`, so that the wrappers around it (DDP, DeepSpeed's engine and its
ZeRO-3 hooks, autocast) see an ordinary forward. It is armed only by the argument `defended=`; any other call,
`generate` included, is the model's own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ema_scale.defenses.base import SCOPES, Defense, Divergence, Scope, Streams, reference_pass
from ema_scale.errors import UserError
from ema_scale.reference import Anatomy, Head, Reference
from ema_scale.training.loss import Term, fused_loss, head_logits
from ema_scale.training.scopes import scope_masks, targets


@dataclass(frozen=True)
class Ask:
    """What one micro-batch is asked for.

    labels: [B, T]. tokens: [scopes], tokens of the whole optimizer step on all processes. factor: what the
    loss is multiplied by, to undo the mean over processes. divergences: with unique names. penalties: name ->
    defense. drift_layers: layers whose distance to the reference is read.
    """

    labels: Tensor
    tokens: Tensor
    factor: float = 1.0
    divergences: Sequence[Divergence] = ()
    penalties: tuple[tuple[str, Defense], ...] = ()
    drift_layers: tuple[int, ...] = ()


class DefendedForward:
    """Patches `anatomy.core.forward`; `remove()` undoes it."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.anatomy: Anatomy = reference.anatomy
        # The parameter objects themselves: inside forward under ZeRO-3 they are gathered through these.
        self._head_parameters = self.anatomy.head_parameters
        self._checked = False
        self._original = self.anatomy.core.forward
        self.anatomy.core.forward = self._patched()

    def remove(self) -> None:
        self.anatomy.core.__dict__.pop("forward", None)

    def _patched(self) -> Any:
        original = self._original

        @functools.wraps(original)  # transformers reads the signature
        def forward(*args: Any, defended: Ask | None = None, **kwargs: Any) -> Any:
            if defended is None:
                return original(*args, **kwargs)
            inputs = {k: v for k, v in kwargs.items() if v is not None and k not in _NOT_FOR_BACKBONE}
            return self._run(defended, inputs)

        return forward

    def _run(self, ask: Ask, inputs: dict[str, Any]) -> dict[str, Any]:
        """{"loss": scalar, "metrics": name -> detached scalar, this micro-batch's share of a mean}."""
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        masks = scope_masks(mask, ask.labels)
        tokens: dict[Scope, Tensor] = dict(zip(SCOPES, ask.tokens, strict=True))
        num_layers = len(self.anatomy.layers)
        wanted = {k for _, defense in ask.penalties for k in defense.layers(num_layers)}
        drift: dict[str, Tensor] = {}
        view = Streams({}, {}, mask, ask.labels, masks, tokens)

        def keep(layer: int, state: Tensor, base: Tensor | None) -> Tensor | None:
            if layer in ask.drift_layers and base is not None:
                drift[f"drift/layer_{layer}"] = view.mean(_relative_distance(state.detach(), base))
            return state if layer in wanted else None

        # Before the policy: under ZeRO-3 a module's last forward must be the one that has a backward.
        expected = None if self._checked else self._few_tokens(inputs)
        needs_reference = bool(ask.divergences or wanted or ask.drift_layers)
        states = self.reference.streams(
            inputs, sorted(wanted | set(ask.drift_layers)), reference=needs_reference, keep=keep
        )
        dtype = torch.promote_types(states.policy.dtype, torch.float32)
        weights = {s: masks[s].to(dtype) / tokens[s].clamp_min(1) for s in SCOPES}
        with _gathered(self._head_parameters):
            head = self.anatomy.head()
            if expected is not None:
                self._check_head(*expected, head)
            terms = [
                Term(
                    (d.strength * weights[d.scope]).flatten(),
                    masks[d.scope].flatten(),
                    d.direction,
                    d.temperature,
                )
                for d in ask.divergences
            ]
            fused = fused_loss(
                states.policy.flatten(0, 1),
                None if states.reference is None else states.reference.flatten(0, 1),
                head,
                targets(ask.labels).flatten(),
                weights["assistant"].flatten(),
                terms,
            )
        share = weights["assistant"].flatten()
        metrics = {
            "ce": (fused.ce * share).sum(),
            "accuracy": (fused.correct * share).sum(),
            "entropy": (fused.entropy * share).sum(),
        }
        for divergence, values in zip(ask.divergences, fused.divergences, strict=True):
            metrics[divergence.name] = values.sum() / tokens[divergence.scope].clamp_min(1)
        loss = fused.loss
        for name, defense in ask.penalties:
            asked = defense.layers(num_layers)
            policy = {k: states.policy_layers[k] for k in asked}
            reference = {k: states.reference_layers[k] for k in asked}
            penalty = defense.penalty(Streams(policy, reference, mask, ask.labels, masks, tokens))
            if penalty is not None:
                loss = loss + penalty
                metrics[name] = penalty.detach()
        metrics["loss"] = loss.detach()
        return {"loss": loss * ask.factor, "metrics": {**metrics, **drift}}

    @torch.no_grad()
    def _few_tokens(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The base model's own logits [1, t, V] and last hidden states [1, t, H] on the first few tokens."""
        few = {"input_ids": inputs["input_ids"][:1, :8], "use_cache": False}
        with self.anatomy.frozen(), reference_pass():
            return self._original(**few).logits, self.anatomy.backbone(**few)[0]

    @torch.no_grad()
    def _check_head(self, theirs: Tensor, hidden: Tensor, head: Head) -> None:
        """Once: an architecture that does something else between last hidden state and logits is refused
        instead of being trained on a wrong loss."""
        ours = head_logits(hidden[0], head, torch.float32)
        error = (ours - theirs[0].float()).abs().max() / theirs.abs().max().clamp_min(1e-6)
        exact = theirs.dtype == hidden.dtype == torch.float32
        if not error < (1e-4 if exact else 3e-2):
            raise UserError(
                f"{type(self.anatomy.core).__name__} is not supported: its logits are not those of its head "
                f"on its last hidden state (relative difference {error:.2g})"
            )
        self._checked = True


_NOT_FOR_BACKBONE = {
    "labels", "output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"
}  # fmt: skip


def _relative_distance(policy: Tensor, reference: Tensor) -> Tensor:
    """||p - r|| / ||r|| per token: [B, T, H] -> [B, T], float32."""
    policy, reference = policy.float(), reference.float()
    norm = torch.linalg.vector_norm(reference, dim=-1)
    return torch.linalg.vector_norm(policy - reference, dim=-1) / norm.clamp_min(1e-12)


def _gathered(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Under ZeRO-3, one gather of the head for forward, none in backward; otherwise nothing."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)
