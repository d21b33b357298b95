"""An adapter merged into its base model: one ordinary checkpoint for tools that take no adapters."""

from __future__ import annotations

from pathlib import Path

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import folder_identity
from ema_scale.core.io import atomic_path, atomic_write_json, made_before
from ema_scale.core.uri import locate
from ema_scale.models.load import load_base, model_problems
from ema_scale.models.lora import with_adapters

MERGED_FROM = "merged_from.json"


def merge_adapter(model: ModelRecipe, adapter: Path, out: Path) -> Path:
    """Write base + adapter with config and tokenizer to `out`, whole or not at all; returns `out`.

    The weights have the base checkpoint's own dtype. `model.dtype` is for training and is not used. merged_from.json
    says what was merged. If `out` holds the same already, it stays as it is.

    Raises UserError if `out` holds anything else, or the model or the adapter cannot be loaded.
    """
    source = locate(model.path)
    merged_from = {
        "base": model.path,
        "base_identity": folder_identity(source, model.revision),
        "adapter_identity": folder_identity(str(adapter)),
    }
    taken = UserError(f"{out}: holds other files already; expected a new or an empty folder")
    if made_before(out, MERGED_FROM, merged_from, taken) is not None:
        return out
    from transformers import AutoConfig, AutoTokenizer

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
        atomic_write_json(unfinished / MERGED_FROM, merged_from)
    return out
