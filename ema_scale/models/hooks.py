"""Hooks that read and change hidden states: the outputs of a decoder-only model's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.models.layout import decoder_layers, hidden_states_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.autograd.graph import saved_tensors_hooks


@contextlib.contextmanager
def edited_states(model: Any, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While it holds, changes[k] maps the policy's states [B, T, H] after decoder layer k (1: the first), in training.

    A layer in evaluation mode and the frozen reference are left alone: a second forward marks itself by
    `reference_pass`, and `Layerwise` does not call a layer's hooks for the reference. Recomputation under gradient
    checkpointing calls them as the first pass did. Hooks that losses and metrics put on hidden states come later and
    see the changed states.

    Raises UserError for a layer that the model does not have.
    """
    layers = decoder_layers(model)
    for k in changes:
        if not 1 <= k <= len(layers):
            raise UserError(f"layers: found {k}, expected 1 to {len(layers)}")
    with contextlib.ExitStack() as stack:
        for k, change in changes.items():
            stack.callback(layers[k - 1].register_forward_hook(_hook(change)).remove)
        yield


def _hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training or in_reference_pass():
            return None
        states = change(hidden_states_of(output))
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook


def like_states(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that gives `vector` [H] in the dtype and on the device of given states. It copies once for each."""
    copies: dict[Any, Tensor] = {}

    def like(states: Tensor) -> Tensor:
        key = (states.dtype, states.device)
        if key not in copies:
            copies[key] = vector.to(states.device, states.dtype)
        return copies[key]

    return like


_in_reference: ContextVar[bool] = ContextVar("ema_scale_reference_pass", default=False)


@contextlib.contextmanager
def reference_pass() -> Iterator[None]:
    """Marks the forward pass of the frozen reference, for hooks that must leave it alone."""
    token = _in_reference.set(True)
    try:
        yield
    finally:
        _in_reference.reset(token)


def in_reference_pass() -> bool:
    """True while the frozen reference runs."""
    return _in_reference.get()


def unchanged_when_saved() -> saved_tensors_hooks:
    """While it holds, autograd saves tensors as they are, whatever hooks stand around: gradient checkpointing counts
    what is saved inside its region, and activation offload moves it to the CPU and back."""
    from torch.autograd.graph import saved_tensors_hooks

    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@contextlib.contextmanager
def capture(
    layers: Sequence[nn.Module], wanted: Collection[int], on_state: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While it holds, on_state(k, states [B, T, H]) is called for every wanted layer as the forward passes it.

    Use it around a forward only: then a recomputation under gradient checkpointing, in backward, calls nothing.
    """
    handles = []
    for index in sorted(set(wanted)):
        if index == 0:

            def at_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                on_state(0, args[0] if args else kwargs["hidden_states"])

            handles.append(layers[0].register_forward_pre_hook(at_input, with_kwargs=True))
        else:

            def at_output(module: nn.Module, args: Any, output: Any, k: int = index) -> None:
                on_state(k, hidden_states_of(output))

            handles.append(layers[index - 1].register_forward_hook(at_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
