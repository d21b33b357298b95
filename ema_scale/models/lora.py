"""The base model and its LoRA adapter: load, attach, save (also when ZeRO-3 has sharded it)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.models.layout import FROZEN_ADAPTER
from ema_scale.models.load import load_base
from ema_scale.models.sharding import full_tensor, gathered

if TYPE_CHECKING:
    import torch

    from ema_scale.config.sections import AdapterRecipe, ModelRecipe


def build_model(model: ModelRecipe, adapter: AdapterRecipe, *, seed: int = 0) -> Any:
    """Base model with a fresh LoRA adapter (PeftModel), which depends on `seed` alone, or with that of `adapter.start`.

    Raises UserError as `load_base` does, and for target modules that the model does not have.
    """
    import peft
    import torch

    base = load_base(model)
    if adapter.start is not None:
        return _continued(base, adapter.start, model.revision)
    torch.manual_seed(seed)
    config = lora_config(base, adapter)
    try:
        return peft.get_peft_model(base, config, revision=model.revision)
    except ValueError as error:
        raise UserError(f"adapter.target_modules: {error}") from None


def _continued(base: Any, start: str, revision: str | None) -> Any:
    """The adapter in the folder `start`, to be trained on, and a frozen copy of it, which is the reference.

    Raises UserError if it is not there or is no LoRA adapter of this model.
    """
    import peft

    if not (Path(start) / "adapter_model.safetensors").is_file():
        raise UserError(f"adapter.start: found no adapter_model.safetensors in {start!r}, expected a PEFT folder")
    try:
        model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
        model.load_adapter(start, FROZEN_ADAPTER, is_trainable=False)
    except (ValueError, RuntimeError, OSError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"adapter.start: {start!r} is no LoRA adapter of this model; {message}") from None
    model.peft_config["default"].revision = revision
    return model


def with_adapters(base: Any, folders: Mapping[str, str]) -> Any:
    """`base` with a frozen adapter of each name, from its PEFT folder or hub id; `base` itself if there are none.

    Raises UserError for one that is not there or is no adapter of this model.
    """
    import peft

    model: Any = base
    for name, folder in folders.items():
        try:
            if model is base:
                model = peft.PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
        except (ValueError, RuntimeError, OSError) as error:
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"adapter {folder}: found none of this model there; {message}") from None
    return model


def lora_config(base: Any, adapter: AdapterRecipe | None = None) -> Any:
    """PEFT's LoraConfig; without a recipe the paper's (r=32, alpha=64, rank-stabilised, all projections)."""
    import peft

    from ema_scale.config.sections import AdapterRecipe

    a = adapter or AdapterRecipe()
    return peft.LoraConfig(
        r=a.r,
        lora_alpha=int(a.alpha) if a.alpha == int(a.alpha) else a.alpha,  # type: ignore[arg-type]
        use_rslora=a.rslora,
        lora_dropout=a.dropout,
        target_modules=linear_names(base) if a.target_modules == "auto" else list(a.target_modules),
        fan_in_fan_out=_has_conv1d(base),
        task_type="CAUSAL_LM",
    )


def with_adapter(
    model: Any, config: Any = None, *, seed: int = 0, trained: bool = True, trust_remote_code: bool = False
) -> Any:
    """A PeftModel: `model` if it is one, else over it, or the base model of that path, by `config` (default: the
    paper's LoRA), with weights that depend on `seed` alone.

    Raises UserError for a model that an adapter was put into without its PeftModel, and if it is to be trained, for one
    that has nothing to train.
    """
    import peft
    import torch

    from ema_scale.config.sections import ModelRecipe

    if isinstance(model, str | Path):
        model = load_base(ModelRecipe(path=str(model), trust_remote_code=trust_remote_code))
    if isinstance(model, peft.PeftModel):
        if trained and not any(p.requires_grad for p in model.parameters()):
            raise UserError(
                "the model's adapter is frozen, so nothing would be trained; load it with "
                "PeftModel.from_pretrained(base, folder, is_trainable=True)"
            )
        return model
    if getattr(model, "peft_config", None):
        raise UserError(
            "the model carries an adapter already (an earlier trainer put it there); give that trainer's .model, "
            "or load the model again"
        )
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config or lora_config(model))


def linear_names(base: Any) -> list[str]:
    """Names of all linear layers inside the decoder layers: q, k, v, o, gate, up and down projections in most
    models, c_attn, c_proj and c_fc in GPT-2. Routers of mixtures of experts are left alone."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and any(c.isdigit() for c in name)
    } - {"gate", "router"}
    if not names:
        raise UserError(f"{type(base).__name__}: found no linear layers; name them in adapter.target_modules")
    return sorted(names)


def _has_conv1d(base: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in base.modules())


_CONFIG = "adapter_config.json"


def save_adapter(
    model: Any,
    folder: Path,
    *,
    main: bool = True,
    finish: Callable[[Path], None] = lambda folder: None,
    stale: Iterable[str] = (),
) -> None:
    """Write `model`'s adapter as a PEFT folder, or into a folder that holds other things, of which all stay. Where its
    adapter_config.json is, the adapter is whole. Every process must call it.

    finish: changes the adapter's folder before anybody sees it; if that fails, nothing was saved.
    stale: files that belong to an earlier adapter in `folder` and are removed with it.

    Raises UserError if a tensor came out empty, which is what saving sharded weights without gathering gives.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with gathered([p for _, p in trained]):
        state = _on_cpu(trained, main)
    if not main:
        return
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise UserError(f"{folder}: {empty[0]} has no elements; the sharded adapter was not gathered")
    # Inside, where renaming never leaves the disk: the folder may be a mount, or the working directory.
    temporary = folder / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # The whole state is given: save_pretrained would otherwise read the sharded model again.
        names = [name for name in model.peft_config if name != FROZEN_ADAPTER]
        model.save_pretrained(str(temporary), state_dict=state, save_embedding_layers=False, selected_adapters=names)
        finish(temporary)
        _move_adapter(temporary, folder, [_CONFIG, *stale])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_adapter(source: Path, target: Path, stale: Iterable[str]) -> None:
    """The files of one PEFT folder over those of another, so that a kill in between leaves no config beside weights
    that are not its own."""
    target.mkdir(exist_ok=True)
    for name in stale:
        (target / name).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == _CONFIG):
        if path.is_dir():
            _move_adapter(path, target / path.name, stale)
        elif path.name != "README.md" or not (target / path.name).exists():  # PEFT's card is no reason to lose one
            os.replace(path, target / path.name)


def _on_cpu(trained: list[tuple[str, Any]], main: bool) -> dict[str, torch.Tensor]:
    """Name -> whole weight; on other processes than the main one, which gather with it, nothing."""
    state = {}
    for name, parameter in trained:
        weight = full_tensor(parameter)
        if main:
            state[name] = weight.cpu().clone()
    return state
