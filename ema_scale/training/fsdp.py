"""torch's FSDP2 by Accelerate, set so that a decoder layer is gathered whole and once for policy and reference.

What Accelerate does not do for us: it drops the wish on CPU processes without a word, wraps only the layers that a
user's config names, and casts what goes in and out of a layer beside autocast.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ema_scale.errors import UserError
from ema_scale.reference.sharding import uses_fsdp

if TYPE_CHECKING:
    from ema_scale.reference import Anatomy

_SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def ask_for_fsdp() -> None:
    """Have every Accelerator of this process use FSDP2."""
    os.environ.update(_SETTINGS)


class FSDPAnywhere:
    """Mixed into a Trainer: FSDP2 also on CPU processes.

    Raises UserError for settings of FSDP under which training would be wrong.
    """

    accelerator: Any
    is_fsdp_enabled: bool

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if uses_fsdp():
            _enable(self.accelerator)
            self.is_fsdp_enabled = True


def _enable(accelerator: Any) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        if accelerator.num_processes == 1:
            raise UserError("FSDP was asked for on one process; start several with `accelerate launch` or torchrun")
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("found FSDP version 1, expected fsdp_version: 2; see launch/accelerate/fsdp2.yaml")
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "fsdp_cpu_ram_efficient_loading: all processes but one would start from empty weights, which the reference "
            "must not; set it false, or use ZeRO-3, which loads in parts"
        )
    if plugin.activation_checkpointing:
        raise UserError("fsdp_activation_checkpointing: found true; use training.gradient_checkpointing in its place")
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise UserError("fsdp_offload_params: not supported; use launch/accelerate/zero3_offload.yaml")


def shard_by_layer(accelerator: Any, anatomy: Anatomy) -> None:
    """Before the model is prepared: one gather a decoder layer, in the dtypes that it is stored in (autocast casts, as
    under DDP), gradients averaged in float32."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in anatomy.layers})
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
