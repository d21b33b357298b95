"""Activations kept in the machine's memory between forward and backward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu

from ema_scale.errors import UserError


def offloaded(args: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside, what forward saves for backward goes to the CPU, pinned where there is a GPU, if
    `args.activation_offloading` (TRL's name) says so. With checkpointing that is each layer's input, and the gradient
    that the fused loss forms; the reference saves nothing either way.
    """
    if not getattr(args, "activation_offloading", False):
        return contextlib.nullcontext()
    return save_on_cpu(pin_memory=torch.cuda.is_available())


def check_offload(args: Any) -> None:
    """Raises UserError for offload without checkpointing: autograd would save, and move, every weight as well."""
    if getattr(args, "activation_offloading", False) and not args.gradient_checkpointing:
        raise UserError(
            "activation offload needs gradient_checkpointing: true; without it all weights would be moved too"
        )
