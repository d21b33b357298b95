"""Sizes of the small world's model and how long each is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """Architecture and training budget. A step sees about `tokens_per_step` tokens; head size is 32 throughout."""

    hidden: int
    layers: int
    pretrain_steps: int
    align_steps: int
    learning_rate: float
    align_learning_rate: float
    tokens_per_step: int = 2048

    def config(self, vocab: int) -> dict[str, Any]:
        """The shape, as in the config.json of its checkpoints."""
        heads = max(1, self.hidden // 32)
        return {
            "model_type": "llama", "vocab_size": vocab, "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "head_dim": 32, "tie_word_embeddings": True,
        }  # fmt: skip


SIZES: dict[str, Size] = {
    # For tests: everything is real but the model has learned little.
    "tiny": Size(64, 2, 20, 5, 3e-3, 1e-4, 512),
    "base": Size(128, 4, 1400, 200, 3e-3, 1e-3),
    # For studies over size: 0.14M, 0.4M, 1.7M, 2.9M, 10.7M parameters (base: 0.9M). Larger ones learn more in a step.
    "nano": Size(64, 2, 2000, 280, 4e-3, 1.3e-3),
    "micro": Size(96, 3, 1600, 230, 3.5e-3, 1.2e-3),
    "mid": Size(160, 5, 1200, 180, 2.5e-3, 8e-4),
    "large": Size(192, 6, 1000, 170, 2e-3, 7e-4),
    "xl": Size(320, 8, 600, 150, 1.2e-3, 4e-4),
}
