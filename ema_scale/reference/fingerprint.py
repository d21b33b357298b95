"""What decides a reference's hidden states, in one short name: the frozen weights, the config, the precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ema_scale.models.layout import ModelLayout
from ema_scale.models.sharding import full_shape, full_tensor, gathered

# Of a config: what says where it came from, or how it is run, but not what it computes.
_IRRELEVANT = ("_name_or_path", "transformers_version", "use_cache", "architectures", "torch_dtype", "dtype")


def fingerprint(layout: ModelLayout, model: Any, autocast: str | None = None) -> str:
    """24 hex digits of a SHA-256 over every weight that is not trained and every buffer that a checkpoint holds (such
    as a router's biases); under ZeRO-3 and FSDP2 a collective.

    model: the PeftModel. autocast: the dtype that forward is cast to and by what, None if it is not. Which modules
    carry a trained adapter does not matter.
    """
    digest = hashlib.sha256(json.dumps(_settings(layout, model, autocast), sort_keys=True, default=str).encode())
    # Names without PEFT's wrappers, so that all adapters over one base share its states.
    named = {_bare(name): p for name, p in model.named_parameters() if not p.requires_grad}
    for name in sorted(named):
        digest.update(f"{name} {(str(named[name].dtype), *full_shape(named[name]))}".encode())
        with gathered([named[name]]):
            digest.update(_raw(full_tensor(named[name])))
    for name, buffer in sorted(_kept_buffers(model), key=lambda pair: pair[0]):
        digest.update(f"{name} {(str(buffer.dtype), *buffer.shape)}".encode())
        digest.update(_raw(full_tensor(buffer)))
    return digest.hexdigest()[:24]


def _settings(layout: ModelLayout, model: Any, autocast: str | None) -> dict[str, Any]:
    config = {k: v for k, v in layout.core.config.to_dict().items() if k not in _IRRELEVANT and "drop" not in k}
    kept = layout.frozen_adapter
    # Of each module, since alpha and rank may be given by patterns.
    scales = {
        _bare(name): module.scaling[kept]
        for name, module in model.named_modules()
        if kept is not None and hasattr(module, "_disable_adapters") and kept in getattr(module, "scaling", {})
    }
    # Kernels round differently, and may leave out what a config asks for, such as Gemma 2's cap on scores.
    attention = getattr(layout.core.config, "_attn_implementation", None)
    return {"config": config, "attention": attention, "autocast": autocast, "adapter": scales}


def _kept_buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Those that are not computed from the config; by names without PEFT's wrappers."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _bare(f"{prefix}.{name}"), buffer


def _bare(name: str) -> str:
    hidden = {"base_model", "base_layer", "original_module"}
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in hidden)


def _raw(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
