"""Sharded weights: one interface to DeepSpeed's ZeRO-3 and torch's FSDP2.

ZeRO-3 empties a parameter and gathers it in place. FSDP2 turns it into a DTensor, which is gathered into a new tensor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def uses_fsdp() -> bool:
    """Whether a launcher, a recipe or TrainingArguments asked Accelerate for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def weights_are_sharded() -> bool:
    """Whether this run also shards frozen weights, so that reading them is a collective."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return uses_fsdp() or bool(is_deepspeed_zero3_enabled())


def under_zero3(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The parameter's shape when gathered."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(
    parameters: Sequence[Any], *, write: bool = False, models: Sequence[Any] = ()
) -> contextlib.AbstractContextManager[Any]:
    """Inside, `full_tensor` gives each of the parameters in full. A collective.

    Args:
        parameters: of any of the models.
        write: every process writes the same values into them. A DTensor takes values by `shard_like` and does not
            need it.
        models: inside a step, the models that DeepSpeed has prepared; it may be fetching their parameters ahead.
    """
    if not any(under_zero3(p) for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    for model in models:
        _wait_for(parameters, model)
    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)


def _wait_for(parameters: Sequence[Any], model: Any) -> None:
    """Have those of the parameters arrive that ZeRO-3 has fetched ahead. GatheredParameters takes what is on its way
    for gathered, and fails when it gives it back.

    The order in which ZeRO-3 fetches is that of the last step's modules. The first step also runs what checks the model
    once, its head included.
    """
    on_its_way = getattr(model, "ds_inflight_param_registry", {})
    waited = [on_its_way.pop(p).wait() for p in parameters if p in on_its_way]
    if waited:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()  # it was copied on another stream


def full_tensor(tensor: Any) -> Tensor:
    """The tensor in full, without gradient. A DTensor is gathered (a collective); under ZeRO-3, call it inside
    `gathered`."""
    tensor = tensor.detach()
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def shard_like(value: Tensor, parameter: Any) -> Tensor:
    """`value`, which is the same on every process, on the parameter's device, and sharded if that is a DTensor."""
    value = value.to(parameter.device)
    if not _is_dtensor(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def shard_frozen(model: Any, layers: Sequence[Any]) -> None:
    """Shard an untrained model by FSDP2: one gather per decoder layer, and one for the rest, released after a call."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=True)


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")
