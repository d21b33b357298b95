"""An adapter merged into its base model: one ordinary checkpoint for tools that take no adapters."""

from __future__ import annotations

from pathlib import Path

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_path
from ema_scale.core.uri import locate
from ema_scale.models.load import load_base, model_problems
from ema_scale.models.lora import with_adapters


def merge_adapter(model: ModelRecipe, adapter: Path, out: Path) -> Path:
    """Write base + adapter with config and tokenizer to `out`, whole or not at all; returns `out`.

    The weights have the base checkpoint's own dtype. `model.dtype` is for training and is not used.

    Raises UserError if `out` holds files, or the model or the adapter cannot be loaded.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds files already; expected a new or an empty folder")
    from transformers import AutoConfig, AutoTokenizer

    source = locate(model.path)
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with model_problems(model.path):
        # Training takes dropout out of the config; the merged model gets the base's own.
        config = AutoConfig.from_pretrained(source, **options)
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        base = load_base(model.model_copy(update={"dtype": dtype}))
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    merged = with_adapters(base, {"default": str(adapter)}).merge_and_unload()
    merged.config = config
    with atomic_path(out) as unfinished:
        merged.save_pretrained(str(unfinished), safe_serialization=True)
        tokenizer.save_pretrained(str(unfinished))
    return out
