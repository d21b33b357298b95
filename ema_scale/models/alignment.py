"""The part of a LoRA update that lies outside the alignment direction, without forming update or projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ema_scale.models.side_adapters import is_side_adapter

PREFIX = "base_model.model."


@dataclass(frozen=True)
class AlignedUpdate:
    """One adapted matrix: update s B A, alignment direction V [out, in], C = V V^T / ||V||_F.

    b: [out, r], a: [r, in], trained. factor: V / sqrt(||V||_F) [out, in], or C [out, out] if `formed`. A matrix without
    a direction (V = 0) has a factor of 0: its whole update counts.
    """

    a: Tensor
    b: Tensor
    scale: float
    factor: Tensor
    formed: bool

    def outside(self) -> Tensor:
        """||(I - C) s B A||_F^2, a scalar with a gradient, in float32 or better."""
        a, b = (x.float() if x.dtype.itemsize < 4 else x for x in (self.a, self.b))
        with torch.autocast(b.device.type, enabled=False):
            left = b.to(self.factor.dtype)
            projected = self.factor @ left if self.formed else self.factor @ (self.factor.T @ left)
            rest = b - projected.to(b.dtype)
            return self.scale**2 * ((rest.T @ rest) * (a @ a.T)).sum()


def aligned_updates(model: Any, difference: Callable[[str], Tensor]) -> list[AlignedUpdate]:
    """One per LoRA module of the policy that is trained.

    model: a PeftModel.
    difference: module name -> W_aligned - W_base, float32, as stored.
    """
    found = []
    for name, module in model.named_modules():
        for adapter, lora_a in dict(getattr(module, "lora_A", None) or {}).items():
            lora_b = module.lora_B[adapter]
            if not lora_b.weight.requires_grad or is_side_adapter(adapter):
                continue
            v = difference(name.removeprefix(PREFIX))
            if getattr(module, "fan_in_fan_out", False):  # GPT-2's Conv1D keeps [in, out]
                v = v.T
            weight = module.get_base_layer().weight
            v = v.to(lora_b.weight.device)
            v = v / v.norm().sqrt().clamp_min(1e-30)
            formed = v.shape[0] < v.shape[1]
            factor = (v @ v.T if formed else v).to(weight.dtype if weight.is_floating_point() else torch.bfloat16)
            found.append(AlignedUpdate(lora_a.weight, lora_b.weight, module.scaling[adapter], factor, formed))
    return found
