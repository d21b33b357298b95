"""Load the base model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.devices import cpu_dtype, warn_if_emulated
from ema_scale.core.errors import UserError
from ema_scale.core.waiting import waiting
from ema_scale.models.sharding import full_shape
from ema_scale.models.staging import staged
from ema_scale.models.weights import check_finite, check_headers, check_names, refuse_info

if TYPE_CHECKING:
    import torch

    from ema_scale.config.sections import ModelRecipe


def pick_dtype(name: str, config: Any = None) -> torch.dtype:
    """A dtype by name; auto: bfloat16 if the GPU has it, else float32; on a CPU as `cpu_dtype` says.

    config: transformers' config of the model. Without it, auto is float32 on a CPU.

    Raises UserError for an unknown name.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if name == "auto":
        if on_gpu:
            name = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        else:
            name = "float32" if config is None else cpu_dtype(config)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"model.dtype: found {name!r}, expected auto, bfloat16 or float32")
    if not on_gpu:
        warn_if_emulated(name)
    return dtype


def load_base(model: ModelRecipe) -> Any:
    """The causal LM of a recipe, from safetensors only, its own dropout off.

    Raises UserError if it does not exist, is no causal LM, or its weights are not what they claim to be: tensors that
    are missing, left over, of another shape or not finite, files that are cut off, pickles.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers.integrations import is_deepspeed_zero3_enabled

    from ema_scale.core.uri import locate

    path, where = locate(model.path), f"model.path: {model.path}"
    weights = staged(path, model.revision)
    if (folder := Path(path).expanduser()).is_dir() and (folder / "config.json").is_file():
        check_headers(folder)
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if is_deepspeed_zero3_enabled():
        check_names(model)
    with model_problems(model.path):
        try:
            config = transformers.AutoConfig.from_pretrained(path, **options)
        except (TypeError, KeyError, AttributeError) as error:  # a value of another type somewhere in the file
            raise ValueError(f"config.json: {error}") from None
        # The defenses alone should regularise fine-tuning, and the reference runs without dropout.
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            for name, value in vars(part).copy().items():
                if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
                    setattr(part, name, 0.0)
        try:
            with waiting(f"{model.path} to be loaded"):
                made: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    weights,
                    config=config,
                    dtype=pick_dtype(model.dtype, config),
                    attn_implementation=model.attn_implementation,
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # so that they are named; they are refused all the same
                    **options,
                )
        except SafetensorError as error:
            raise UserError(f"{where}: not whole safetensors files ({error}); download them again") from None
    loaded, info = made
    loaded.name_or_path = loaded.config._name_or_path = path  # an adapter names its base by it
    refuse_info(where, info)
    check_finite(loaded.named_parameters(), where)
    return loaded


@contextlib.contextmanager
def model_problems(path: str) -> Iterator[None]:
    """Turns transformers' errors for a `path` without a usable model into UserErrors."""
    try:
        yield
    except ImportError as error:  # an attention, or a kind of weights, that another package brings
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: {path!r} needs a package that is not installed; {message}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.path: found {path!r}, expected a folder or hub id of a causal language model with "
            f"safetensors; {message}"
        ) from None


def parameter_counts(model: Any) -> dict[str, int]:
    """base: parameters of the model without adapters; trained: those that training changes.

    Tied parameters count once, sharded ones in full.
    """
    sizes = [(n, p.requires_grad, math.prod(full_shape(p))) for n, p in model.named_parameters()]
    return {
        "base": sum(size for name, _, size in sizes if "lora_" not in name),
        "trained": sum(size for _, trained, size in sizes if trained),
    }
