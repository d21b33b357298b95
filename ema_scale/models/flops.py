"""Floating-point operations per token, and what a GPU can do: for model-FLOP utilisation and plans.

A multiplication with a matrix of n weights takes 2n operations per token, and its backward 2n per gradient (Kaplan et
al., arXiv 2001.08361, section 2.1). Utilisation counts what the model needs, not what checkpointing computes again
(PaLM, arXiv 2204.02311, appendix B). Importing this module does not load torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ema_scale.models.sharding import full_shape

# Dense bfloat16 with float32 accumulation, in 10^12 operations per second, from NVIDIA's data sheets (half of what they
# print "with sparsity") and AMD's. By the name that CUDA gives the device, longer names first.
PEAK_TFLOPS = (
    ("B200", 2250.0), ("GH200", 989.4), ("H200", 989.4), ("H100 NVL", 835.0), ("H100 PCIE", 756.0), ("H100", 989.4),
    ("H800", 989.4), ("A100", 312.0), ("A800", 312.0), ("A30", 165.0), ("A40", 149.7), ("A10G", 70.0), ("A10", 125.0),
    ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0), ("MI300X", 1307.4), ("RTX 4090", 165.2), ("RTX 3090", 71.0),
)  # fmt: skip


@dataclass(frozen=True)
class Flops:
    """Operations per token in the forward pass.

    base: the frozen matrices of the decoder layers.
    adapter: LoRA's matrices.
    attention: scores and values.
    head: the language-model head.
    """

    base: float
    adapter: float
    attention: float
    head: float

    @property
    def forward(self) -> float:
        """The policy's forward."""
        return self.base + self.adapter + self.attention + self.head

    @property
    def reference(self) -> float:
        """The reference's forward."""
        return self.base + self.attention + self.head

    @property
    def training(self) -> float:
        """Forward and backward of the policy. Frozen matrices pass a gradient on and get none."""
        return 2 * self.base + 3 * self.adapter + 3 * self.attention + 2 * self.head

    @property
    def recomputed(self) -> float:
        """What gradient checkpointing of the decoder layers adds."""
        return self.base + self.adapter + self.attention


def flops(model: Any, context: float, *, labelled: float = 1.0) -> Flops:
    """Operations of a PeftModel or a bare causal LM, also if sharded by ZeRO-3 or on the meta device.

    In a mixture of experts only the experts that a token is sent to count.

    context: how many positions a token attends to on average: half a row's length under causal attention.
    labelled: share of the tokens whose logits are needed.
    """
    from ema_scale.models.layout import ModelLayout

    layout = ModelLayout.of(model, adapters=False)
    config = layout.core.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    active_share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    base = adapter = 0.0
    for layer in layout.layers:
        for name, parameter in layer.named_parameters():
            shape = full_shape(parameter)
            if len(shape) < 2:
                continue  # norms and biases
            size = 2.0 * math.prod(shape) * (active_share if ".experts." in name else 1.0)
            if "lora_" in name:
                adapter += size
            else:
                base += size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * width * context
    head = 2.0 * math.prod(full_shape(layout.head_parameters[0]))
    return Flops(base, adapter, attention, head * labelled)


def peak_flops(device: str) -> float | None:
    """bfloat16 operations per second of a GPU of that name; None if it is not in the table."""
    name = device.upper().replace("-", " ")
    # No digit may follow: an RTX A4000 is no A40.
    peaks = (peak for part, peak in PEAK_TFLOPS if re.search(rf"{part}(?!\d)", name) and "LAPTOP" not in name)
    return next((1e12 * peak for peak in peaks), None)
