"""What defenses make of hidden states while a batch passes through the model: penalties, token weights, and drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ema_scale.defenses.base import PenaltyInputs
from ema_scale.defenses.row_groups import NamedPenalty
from ema_scale.defenses.terms import TokenSet
from ema_scale.models.hooks import unchanged_when_saved
from ema_scale.reference.base import HiddenStates
from ema_scale.training.token_masks import attention_mask_of, segment_ids


class Request(Protocol):
    """What a reader uses of a `LossRequest`."""

    @property
    def labels(self) -> Tensor: ...
    @property
    def masks(self) -> Mapping[TokenSet, Tensor]: ...
    @property
    def step_tokens(self) -> Mapping[TokenSet, Tensor]: ...
    @property
    def penalties(self) -> Sequence[NamedPenalty]: ...
    @property
    def weighing(self) -> Sequence[NamedPenalty]: ...
    @property
    def drift_layers(self) -> tuple[int, ...]: ...


class PenaltyReader:
    """Reads the policy's and the reference's hidden states: for drift, penalties and weights of tokens.

    A penalty that is a sum over layers is computed while the forward pass is at each layer (`read`), so that no states
    are stored for it. Any other one is computed at the end, from the states of `stored_layers`.
    """

    def __init__(self, request: Request, inputs: dict[str, Any], num_layers: int) -> None:
        empty = PenaltyInputs(
            {}, {}, attention_mask_of(inputs), request.labels, request.masks, request.step_tokens,
            segment_ids(inputs.get("position_ids")),
        )  # fmt: skip
        self._inputs = empty
        self._drift_layers = request.drift_layers
        self._penalties = [(p, replace(empty, parts=p.parts, readings={})) for p in request.penalties]
        self._weighing = [(p, replace(empty, parts=p.parts)) for p in request.weighing]
        readers = (*request.penalties, *request.weighing)
        self._layers_of = {p.name: p.defense.penalty_layers(num_layers) for p in readers}
        self._by_layer: dict[str, dict[int, Tensor]] = {p.name: {} for p in request.penalties}
        at_once, later = (
            {k for p in request.penalties if p.defense.layer_by_layer is now for k in self._layers_of[p.name]}
            for now in (True, False)
        )
        self.layers = frozenset(at_once | {*request.drift_layers})
        self.stored_layers = frozenset(later.union(*(self._layers_of[p.name] for p in request.weighing)))
        self.drift: dict[str, Tensor] = {}

    def read(self, layer: int, policy: Tensor, reference: Tensor) -> None:
        if layer in self._drift_layers:
            distance = _relative_distance(policy.detach(), reference)
            self.drift[f"drift/layer_{layer}"] = self._inputs.mean(distance)
        for penalty, inputs in self._penalties:
            if penalty.defense.layer_by_layer and layer in self._layers_of[penalty.name]:
                value = _penalty_at(penalty, replace(inputs, reference={layer: reference}), layer, policy)
                if value is not None:
                    self._by_layer[penalty.name][layer] = value

    def values(self, states: HiddenStates) -> dict[str, Tensor]:
        """Name -> value of every penalty that has one, after the forward pass."""
        values: dict[str, Tensor] = {}
        for penalty, inputs in self._penalties:
            value: Tensor | None
            if penalty.defense.layer_by_layer:
                parts = list(self._by_layer[penalty.name].values())
                value = torch.stack(parts).sum() if parts else None
            else:
                value = penalty.defense.penalty(self._with_states(penalty, inputs, states))
            if value is not None:
                values[penalty.name] = value
        return values

    def readings(self) -> dict[str, tuple[TokenSet, Tensor]]:
        """Name -> the tokens and the value, detached, of what penalties have read."""
        return {f"{p.name}/{name}": read for p, inputs in self._penalties for name, read in inputs.readings.items()}

    @torch.no_grad()
    def token_weights(self, states: HiddenStates) -> dict[str, Tensor]:
        """ "ce" or a term's name -> the product of all defenses' factors [B, T], after the forward pass."""
        product: dict[str, Tensor] = {}
        for weighing, inputs in self._weighing:
            found = weighing.defense.token_weights(self._with_states(weighing, inputs, states))
            for own, factor in found.items():
                name = weighing.logged.get(own, own)
                product[name] = product[name] * factor if name in product else factor
        return product

    def _with_states(self, reader: NamedPenalty, inputs: PenaltyInputs, states: HiddenStates) -> PenaltyInputs:
        layers = self._layers_of[reader.name]
        policy = {k: states.policy_layers[k] for k in layers}
        return replace(inputs, policy=policy, reference={k: states.reference_layers[k] for k in layers})


def _penalty_at(penalty: NamedPenalty, inputs: PenaltyInputs, layer: int, policy: Tensor) -> Tensor | None:
    def at_layer(states: Tensor) -> Tensor | None:
        return penalty.defense.penalty(replace(inputs, policy={layer: states}))

    return eager_gradient(at_layer, policy)


def _relative_distance(policy: Tensor, reference: Tensor) -> Tensor:
    """||p - r|| / ||r|| per token: [B, T, H] -> [B, T], float32."""
    policy, reference = policy.float(), reference.float()
    norm = torch.linalg.vector_norm(reference, dim=-1)
    return torch.linalg.vector_norm(policy - reference, dim=-1) / norm.clamp_min(1e-12)


def eager_gradient(term: Callable[[Tensor], Tensor | None], state: Tensor) -> Tensor | None:
    """term(state), a scalar or None, with its gradient by `state` formed at once.

    For backward only that gradient is kept, shaped and typed as `state`, where autograd would keep several float32
    copies. It may be called inside a region of gradient checkpointing: the recomputation in backward does not call it.
    """
    leaf = state.detach().requires_grad_(state.requires_grad and torch.is_grad_enabled())
    with unchanged_when_saved():
        value = term(leaf)
        if value is None or not value.requires_grad:
            return value
        (gradient,) = torch.autograd.grad(value, leaf)
    result: Tensor = _WithGradient.apply(state, value.detach(), gradient)
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient  # not by save_for_backward, for the same reason
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.gradient * upstream).to(ctx.gradient.dtype), None, None
