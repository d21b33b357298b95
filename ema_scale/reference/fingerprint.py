"""A short name for what decides a reference's hidden states: frozen weights, config, precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ema_scale.models.layout import ModelLayout
from ema_scale.models.sharding import full_shape, full_tensor, gathered
from ema_scale.models.side_adapters import is_side_adapter

# Fields of a config that say where it came from or how it is run, but not what it computes.
_IRRELEVANT = ("_name_or_path", "transformers_version", "use_cache", "architectures", "torch_dtype", "dtype")


def fingerprint(layout: ModelLayout, model: Any, autocast: str | None = None) -> str:
    """24 hex digits of a SHA-256. Under ZeRO-3 and FSDP2 a collective.

    It covers every untrained weight and every buffer that a checkpoint holds (such as a router's biases), but not which
    modules carry a trained adapter.

    model: the PeftModel.
    autocast: the dtype that forward is cast to, and by what; None if it is not.
    """
    digest = hashlib.sha256(json.dumps(_settings(layout, model, autocast), sort_keys=True, default=str).encode())
    # Names without PEFT's wrappers, so that all adapters over one base share a cache.
    frozen = {name: p for name, p in model.named_parameters() if not (p.requires_grad or is_side_adapter(name))}
    named = {_bare(name): p for name, p in frozen.items()}
    for name in sorted(named):
        digest.update(f"{name} {(str(named[name].dtype), *full_shape(named[name]))}".encode())
        with gathered([named[name]]):
            digest.update(_raw(full_tensor(named[name])))
    for name, buffer in sorted(_stored_buffers(model), key=lambda pair: pair[0]):
        digest.update(f"{name} {(str(buffer.dtype), *buffer.shape)}".encode())
        digest.update(_raw(full_tensor(buffer)))
    return digest.hexdigest()[:24]


def _settings(layout: ModelLayout, model: Any, autocast: str | None) -> dict[str, Any]:
    config = {k: v for k, v in layout.core.config.to_dict().items() if k not in _IRRELEVANT and "drop" not in k}
    adapter = layout.frozen_adapter
    # One per module, since alpha and rank may be given by patterns.
    scales = {
        _bare(name): module.scaling[adapter]
        for name, module in model.named_modules()
        if adapter is not None and hasattr(module, "_disable_adapters") and adapter in getattr(module, "scaling", {})
    }
    # Kernels round differently, and may ignore parts of a config, such as Gemma 2's cap on scores.
    attention = getattr(layout.core.config, "_attn_implementation", None)
    return {"config": config, "attention": attention, "autocast": autocast, "adapter": scales}


def _stored_buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds, by names without PEFT's wrappers. The others are computed from the config."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _bare(f"{prefix}.{name}"), buffer


def _bare(name: str) -> str:
    hidden = {"base_model", "base_layer", "original_module"}
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in hidden)


def _raw(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
