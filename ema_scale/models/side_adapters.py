"""LoRA adapters beside the policy's while training: switched on by rows, and left out of everything that is saved.

PEFT adds up what all active adapters give. Their linear layers are patched, so that an adapter adds something to some
rows only, and gets its gradient from some rows only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.models.weights import check_adapter

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "beside_"


@dataclass(frozen=True)
class SideAdapter:
    """A LoRA adapter beside the policy's while training lasts. It is never part of what is saved as the adapter.

    It is on for the task's rows and for the rows that it learns, and off for rows that other defenses bring in, in the
    reference, and in evaluation.

    folder: a PEFT folder or hub id, which stays frozen. None: a new adapter of the policy's shape, which is trained.
    learns: the part of the rows whose gradient goes into a new adapter. The policy's own adapter then gets the
        gradient of all other rows, and no row's gradient reaches both.
    scale: a factor on what the adapter adds.
    """

    folder: str | None = None
    learns: str | None = None
    scale: float = 1.0


def is_side_adapter(name: str) -> bool:
    """Whether an adapter, or a parameter of one, by its name, stands beside the policy's."""
    return any(part.startswith(_PREFIX) for part in name.split("."))


class SideAdapters:
    """Adds adapters to a PeftModel. They are on while `active` holds, for the rows that `route` names.

    Raises UserError for an adapter that does not exist, is not of this model or no LoRA; and for a policy whose adapter
    is more than plain LoRA, if rows are routed.
    """

    def __init__(self, model: Any, adapters: Sequence[SideAdapter], *, seed: int = 0) -> None:
        self.adapters = tuple(adapters)
        self.policy: str = model.active_adapter
        self._names = [f"{_PREFIX}{index}" for index in range(len(self.adapters))]
        self._on: dict[str, Tensor] = {}
        self._learns: dict[str, Tensor] = {}
        for index, (name, adapter) in enumerate(zip(self._names, self.adapters, strict=True)):
            if adapter.folder is None:
                _make(model, name, seed + 1 + index)
            else:
                _load(model, name, adapter.folder)
        self._tuners = [module for module in model.modules() if hasattr(module, "lora_A")]
        routed = any(adapter.learns is not None for adapter in self.adapters)
        for tuner in self._tuners:
            for name, adapter in zip(self._names, self.adapters, strict=True):
                if name in tuner.lora_A:
                    tuner.scaling[name] *= adapter.scale
            for name in [*self._names, *([self.policy] if routed else [])]:
                self._patch(tuner, name)

    def _patch(self, tuner: Any, name: str) -> None:
        from torch import nn

        if name not in tuner.lora_A:
            return
        if name in getattr(tuner, "lora_variant", {}) or type(tuner.lora_A[name]) is not nn.Linear:
            raise UserError(
                f"an adapter beside the policy's: {name} is more than plain LoRA on linear layers (DoRA, "
                "convolutions), whose rows cannot be told apart"
            )
        for linear, last in ((tuner.lora_A[name], False), (tuner.lora_B[name], True)):
            linear.forward = self._patched(linear, name, last)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the adapters add to the forward pass of a model in training."""
        before = [tuner._active_adapter for tuner in self._tuners]
        # Not by PEFT's set_adapter, which would make frozen adapters trainable.
        for tuner in self._tuners:
            tuner._active_adapter = [self.policy, *self._names]
        try:
            yield
        finally:
            for tuner, names in zip(self._tuners, before, strict=True):
                tuner._active_adapter = names
            self._on, self._learns = {}, {}

    def route(self, task: Tensor, learned: Sequence[Tensor | None]) -> None:
        """Say which positions the next forward and backward pass are of.

        task: bool [B, T], those of the task's rows.
        learned: for each adapter, those of the rows that it learns; None for a frozen one.
        """
        self._learns = {}
        for name, own in zip(self._names, learned, strict=True):
            self._on[name] = task if own is None else task | own
            if own is not None:
                self._learns[name] = own
        if self._learns:
            others = ~task & task
            for own in self._learns.values():
                others = others | own
            self._learns[self.policy] = ~others

    def _patched(self, linear: Any, name: str, last: bool) -> Callable[[Tensor], Tensor]:
        import torch
        from torch.nn.functional import linear as product

        original = linear.forward
        beside = name != self.policy

        def forward(x: Tensor) -> Tensor:
            on = self._on.get(name)
            if beside and last and (on is None or not linear.training):
                return x.new_zeros(*x.shape[:-1], linear.out_features)
            out: Tensor = original(x)
            learns = self._learns.get(name) if linear.training else None
            if learns is not None and torch.is_grad_enabled():
                bias = None if linear.bias is None else linear.bias.detach()
                # The same values, but no gradient for the weights. That of the states passes in both.
                out = torch.where(_fitting(learns, x), out, product(x, linear.weight.detach(), bias))
            if beside and last and on is not None:
                out = torch.where(_fitting(on, x), out, torch.zeros_like(out))
            return out

        return forward


def _fitting(mask: Tensor, states: Tensor) -> Tensor:
    """mask [B, T] beside states [B, T, H]. Raises UserError for states of another shape."""
    if states.shape[:-1] != mask.shape:
        raise UserError(
            f"an adapter beside the policy's: found states of shape {list(states.shape)} for a batch of "
            f"{list(mask.shape)} tokens, as in a mixture of experts; leave its layers out of adapter.target_modules"
        )
    return mask[..., None]


def _make(model: Any, name: str, seed: int) -> None:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(name, deepcopy(model.peft_config[model.active_adapter]))
    for parameter_name, parameter in model.named_parameters():
        if name in parameter_name.split("."):
            parameter.requires_grad_(True)


def _load(model: Any, name: str, folder: str) -> None:
    try:
        found = check_adapter(folder, model.get_base_model())
        model.load_adapter(str(found), name, is_trainable=False)
    except (ValueError, RuntimeError, OSError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"adapter {folder}: is no LoRA adapter of this model; {message}") from None
    for parameter_name, parameter in model.named_parameters():
        if name in parameter_name.split("."):
            parameter.requires_grad_(False)
