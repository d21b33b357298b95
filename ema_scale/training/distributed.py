"""Training on several processes. A wrong mode fails silently here, so it is corrected or refused."""

from __future__ import annotations

import atexit
import importlib.util
import os
import socket
import time
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.paths import find_file
from ema_scale.models.sharding import uses_fsdp

if TYPE_CHECKING:
    from ema_scale.models.layout import ModelLayout


_registered = False
_FSDP_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def is_main() -> bool:
    """Whether this process writes files and progress (rank 0)."""
    return int(os.environ.get("RANK", "0")) == 0


def launched_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def uses_deepspeed() -> bool:
    """Whether a launcher or `prepare_environment` asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def zero_stage(deepspeed: str | None) -> int:
    """The ZeRO stage of a DeepSpeed JSON config; 0 without a config. Raises UserError if it cannot be read."""
    if deepspeed is None:
        return 0
    try:
        config = read_json(find_file(deepspeed))
        return int((config.get("zero_optimization") or {})["stage"])
    except KeyError:
        return 0
    except (UserError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"training.deepspeed: {deepspeed}: expected a DeepSpeed JSON config; {error}") from None


def prepare_environment(deepspeed: str | None = None, fsdp: bool = False) -> None:
    """Set the environment that TrainingArguments reads when it is made: for DeepSpeed, also on a CPU, or for FSDP2.

    deepspeed: a DeepSpeed JSON config.
    fsdp: shard by FSDP2. With neither, the launcher's environment decides.

    Raises UserError if the file is missing, both are asked for, or the launcher asks for DeepSpeed on the CPU by
    use_cpu: Accelerate would silently run DDP.
    """
    import torch

    if fsdp:
        os.environ.update(_FSDP_ENVIRONMENT)
    if uses_fsdp() and (deepspeed is not None or uses_deepspeed()):
        raise UserError("both FSDP and DeepSpeed were asked for; leave one out")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every import of it warns
    where = "training.deepspeed"
    if deepspeed is None and uses_deepspeed():
        # An accelerate config names its file relative to a folder, and may be used in another one.
        where, deepspeed = "deepspeed_config_file", os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if deepspeed is not None:
        if not (config := find_file(deepspeed)).is_file():
            raise UserError(f"{where}: no file {deepspeed!r} in {os.getcwd()}; expected a DeepSpeed JSON config")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(config)
        os.environ.setdefault("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true")
    if not uses_deepspeed():
        # A ZeRO-3 run before this one in the same process would still shard the model while it loads.
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("training.deepspeed: DeepSpeed is not installed; run: pip install 'ema-scale[deepspeed]'")
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        raise UserError(
            "DeepSpeed was launched with use_cpu: Accelerate would run DDP instead; leave use_cpu out of the "
            "accelerate config (without a GPU the processes run on the CPU anyway)"
        )
    if os.environ.get("LOCAL_RANK") is None:  # started without a launcher: a world of one
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**alone, "MASTER_PORT": str(_free_port())}.items():
            os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        from deepspeed import ops

        # A shared-memory op that is compiled on first use. That takes a minute, and a killed build blocks later runs.
        getattr(ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that torch has renamed: several lines of warnings per layer.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def device_arguments() -> dict[str, Any]:
    """TrainingArguments with which CPU processes find each other; {} on a GPU."""
    import torch

    if torch.cuda.is_available():
        return {}
    if uses_deepspeed():
        # Without a named backend, Accelerate treats each DeepSpeed process on a CPU as a world of its own.
        return {"ddp_backend": "gloo"}
    import torch.distributed as dist

    if launched_processes() > 1 and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        # transformers passes its time-out on for GPUs and DeepSpeed, but not for plain CPU processes.
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds()))
    return {"use_cpu": True}


def timeout_seconds() -> int:
    """How long a process waits for another before it fails: EMA_TIMEOUT_SECONDS, else torch's half hour."""
    found = os.environ.get("EMA_TIMEOUT_SECONDS", "1800")
    if not found.isdecimal() or int(found) == 0:
        raise UserError(f"EMA_TIMEOUT_SECONDS: found {found!r}, expected a number of seconds, such as 1800")
    return int(found)


def check_world(accelerator: Any) -> None:
    """Raises UserError if Accelerate, torch and the launcher disagree on the number of processes."""
    import torch.distributed as dist

    real = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    launched = launched_processes()
    if not accelerator.num_processes == real == launched:
        raise UserError(
            f"{launched} processes were launched, torch.distributed sees {real}, Accelerate sees "
            f"{accelerator.num_processes}: every process would train alone; see launch/README.md"
        )


def destroy_process_group_at_exit() -> None:
    """At exit, close this process's connections and let gloo's threads finish. Call it when a run has ended on all
    processes.

    A gloo thread frees the tensors of the last collective after the collective has returned, and takes the
    interpreter's lock for it. If the interpreter is gone by then, the process aborts (SIGABRT, "terminate called
    without an active exception"). A launcher and Slurm would then report a finished run as failed.
    """
    global _registered
    if launched_processes() > 1 and not _registered:
        _registered = True
        atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    gloo = dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if gloo:  # destroying does not wait for its threads
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FSDPMixin:
    """Mixed into a Trainer: FSDP2, on CPU processes as well.

    Raises UserError for FSDP settings under which training would be wrong.
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
            "fsdp_cpu_ram_efficient_loading: all processes but one would start from empty weights, and the reference "
            "needs them; set it false, or use ZeRO-3, which loads in parts"
        )
    if plugin.activation_checkpointing:
        raise UserError("fsdp_activation_checkpointing: found true; use training.gradient_checkpointing in its place")
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise UserError("fsdp_offload_params: not supported; use launch/accelerate/zero3_offload.yaml")


def shard_by_layer(accelerator: Any, layout: ModelLayout) -> None:
    """Have FSDP2 gather one decoder layer at a time, in its stored dtype (autocast casts, as under DDP), and average
    gradients in float32. Call it before the model is prepared."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layout.layers})
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
