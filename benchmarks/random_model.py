"""Random weights and rows in a real model's shape: a step takes as long, and nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

from ema_scale.core.errors import UserError
from ema_scale.planning.model_shapes import PUBLISHED

# Layers to head as in a 7B model, where a CPU takes about a second a step.
SMALL = {
    "model_type": "qwen2", "num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 2048,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": False,
}  # fmt: skip
# As HuggingFaceTB/SmolLM2-135M-Instruct on the hub: a real vocabulary on a model that a CPU trains in seconds a step.
SMOLLM2 = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {"small": SMALL, **PUBLISHED, "smollm2-135m": SMOLLM2}


def fields_of(name: str, layers: int | None = None) -> dict[str, Any]:
    """The fields of config.json for a shape, cut to `layers`. Raises UserError for an unknown name."""
    if name not in SHAPES:
        raise UserError(f"--model: found {name!r}, expected one of {', '.join(SHAPES)}")
    return SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})


def random_base(fields: dict[str, Any], dtype: str, device: str) -> Any:
    """A causal LM with weights of seed 0, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in fields.items() if k != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], max_position_embeddings=4096, **values)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def random_rows(fields: dict[str, Any], rows: int, length: int) -> Any:
    """A tokenized dataset of rows of one length, the second half of each to be learned."""
    from datasets import Dataset

    ids = torch.randint(1, fields["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    labels = [[-100] * (length // 2) + row[length // 2 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [length] * rows})


def placeholder_tokenizer() -> Any:
    """The tokenizer that a trainer requires; random rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
    )
