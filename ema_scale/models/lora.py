"""LoRA adapters: attach them to a base model, load them, save them (also if ZeRO-3 or FSDP2 shards the model)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.disk import writing
from ema_scale.core.errors import UserError
from ema_scale.models.layout import FROZEN_ADAPTER
from ema_scale.models.load import load_base
from ema_scale.models.sharding import full_tensor, gathered
from ema_scale.models.side_adapters import is_side_adapter
from ema_scale.models.weights import check_adapter

if TYPE_CHECKING:
    import torch

    from ema_scale.config.sections import AdapterRecipe, ModelRecipe


def build_model(model: ModelRecipe, adapter: AdapterRecipe, *, seed: int = 0) -> Any:
    """A PeftModel: the base model with the adapter of `adapter.start`, or with a new one that depends on `seed` alone.

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
    """A PeftModel with the adapter in the folder `start`, to be trained further, and a frozen copy of it as reference.

    Raises UserError if it does not exist or is no LoRA adapter of this model.
    """
    import peft

    try:
        check_adapter(start, base)
    except UserError as error:
        raise UserError(f"adapter.start: {error}") from None
    try:
        model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
        model.load_adapter(start, FROZEN_ADAPTER, is_trainable=False)
    except (ValueError, RuntimeError, OSError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"adapter.start: {start!r} is no LoRA adapter of this model; {message}") from None
    model.peft_config["default"].revision = revision
    return model


def with_adapters(base: Any, folders: Mapping[str, str]) -> Any:
    """`base` with frozen adapters; `base` itself if there are none.

    folders: adapter name -> PEFT folder or hub id.

    Raises UserError for an adapter that does not exist, is not of this model, or whose weights are not what they claim
    to be.
    """
    import peft

    model: Any = base
    for name, reference in folders.items():
        folder = str(check_adapter(reference, base))
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
    """PEFT's LoraConfig; without a recipe that of the paper (r=32, alpha=64, rank-stabilised, all projections)."""
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
    """A PeftModel.

    model: a PeftModel, which is returned; or a causal LM, or the path of one, which gets an adapter.
    config: the adapter's PEFT config; default: the paper's LoRA.
    seed: decides the adapter's first weights.
    trained: whether the adapter is to be trained.

    Raises UserError for a model with an adapter that is no PeftModel, and if `trained`, for a frozen adapter.
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
    """Names of all linear layers inside the decoder layers, without routers of mixtures of experts.

    In most models: q, k, v, o, gate, up and down projections; in GPT-2: c_attn, c_proj and c_fc.

    Raises UserError if there are none.
    """
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
    """Write the adapter as a PEFT folder. A collective.

    Other files in `folder` stay. adapter_config.json comes last: where it is, the adapter is complete.

    main: whether this process writes.
    finish: changes the adapter's folder before it is moved into place. If it fails, nothing was saved.
    stale: files of an earlier adapter in `folder`, which are removed with it.

    Raises UserError if a tensor is empty, as sharded weights are that were not gathered.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and not is_side_adapter(name)]
    with gathered([p for _, p in trained]):
        state = _on_cpu(trained, main)
    if not main:
        return
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise UserError(f"{folder}: {empty[0]} has no elements; the sharded adapter was not gathered")
    # Inside `folder`, so that renaming stays on one disk: the folder may be a mount, or the working directory.
    temporary = folder / ".adapter.tmp"
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write_adapter(model, state, temporary)
            finish(temporary)
            _move_adapter(temporary, folder, [_CONFIG, *stale])
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_adapter(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write trained weights, by parameter name, as a PEFT folder. Not a collective: `model` itself is not read.

    Adapters beside the policy's are left out."""
    names = [name for name in model.peft_config if name != FROZEN_ADAPTER and not is_side_adapter(name)]
    own = {name: tensor for name, tensor in state.items() if not is_side_adapter(name)}
    model.save_pretrained(str(folder), state_dict=own, save_embedding_layers=False, selected_adapters=names)


def _move_adapter(source: Path, target: Path, stale: Iterable[str]) -> None:
    """Move the files of one PEFT folder over those of another. A kill in between leaves no config beside weights of
    another adapter."""
    target.mkdir(exist_ok=True)
    for name in stale:
        (target / name).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == _CONFIG):
        if path.is_dir():
            _move_adapter(path, target / path.name, stale)
        elif path.name != "README.md" or not (target / path.name).exists():  # PEFT's card replaces no other README
            os.replace(path, target / path.name)


def _on_cpu(trained: list[tuple[str, Any]], main: bool) -> dict[str, torch.Tensor]:
    """Name -> whole weight. Processes other than the main one take part in the gathering and get nothing."""
    state = {}
    for name, parameter in trained:
        weight = full_tensor(parameter)
        if main:
            state[name] = weight.cpu().clone()
    return state
