"""Which sampler is used, and which of its settings enter the cache key of an answer or a verdict.

Each part of a key is empty where nothing is set, so that defaults change no key.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.core.imports import without_garbage_collection
from ema_scale.inference.base import Sampler, SamplerOptions
from ema_scale.inference.cpu import is_small
from ema_scale.inference.vllm_engine import is_cpu_build

if TYPE_CHECKING:
    from ema_scale.config.sections import EvaluationRecipe
    from ema_scale.inference.engines import Engines

log = logging.getLogger(__name__)

# Answers up to which transformers is taken on a CPU, where vLLM takes 17 to 40 s longer to start. Measured: an answer
# of a model of 135M parameters takes it 0 (float32) to 0.1 s (bfloat16) longer than vLLM, one of a model of 1M 1.5 ms.
SMALL_JOB, SMALL_JOB_OF_SMALL_MODEL = 256, 10_000
TRANSFORMERS = "transformers"


def make_sampler(kind: str, options: SamplerOptions, engines: Engines | None = None) -> Sampler:
    """`vllm`, `transformers`, `openai`, or `auto`: vLLM if it is installed and can run this model with adapters.

    engines: processes of their own that sample together; None: one engine, here.

    Raises UserError if vLLM is asked for and cannot serve the model, naming why, and for engines of an endpoint.
    """
    if engines is not None:
        if kind == "openai":
            raise UserError(
                "--engines: found evaluation.sampler: openai, whose server has the engines; start it with as many "
                "(vllm serve --data-parallel-size N), and leave the option out"
            )
        from ema_scale.inference.engines import ManyEngines

        return ManyEngines(sampler_name(kind, options), options, engines)
    if kind not in ("auto", "vllm", "transformers", "openai"):
        raise UserError(f"evaluation.sampler: found {kind!r}, expected auto, vllm, transformers or openai")
    if kind == "openai":
        from ema_scale.inference.openai_sampler import OpenAISampler

        return OpenAISampler(options)
    if kind != "transformers":
        with without_garbage_collection():  # vLLM imports half of itself while its engine starts
            reason = choose_reason_against_vllm(options)
            if reason is None:
                from ema_scale.inference.vllm_sampler import VllmSampler

                return VllmSampler(options)
        if kind == "vllm":
            raise UserError(f"evaluation.sampler: vllm cannot serve this model: {reason}; use transformers")
        log.warning("sampling with transformers, not vLLM: %s", reason)
    with without_garbage_collection():
        from ema_scale.inference.transformers_sampler import TransformersSampler

    return TransformersSampler(options)


def sampler_name(kind: str, options: SamplerOptions, answers: int | None = None) -> str:
    """The sampler that `make_sampler` would make, without loading a model. For `auto` the log says why.

    answers: how many are asked for; None: as for many.
    """
    if kind != "auto":
        return kind
    most = SMALL_JOB_OF_SMALL_MODEL if is_small(options.model) else SMALL_JOB
    if answers and answers <= most and chooses_by_count(kind, options):
        reason: str | None = f"{answers:,} answers take less time than vLLM's start on a CPU"
    else:
        reason = choose_reason_against_vllm(options)
    if reason:
        log.info("sampling with transformers, not vLLM: %s", reason)
        return TRANSFORMERS
    log.info("sampling with vLLM%s", "" if answers is None else f": {answers:,} answers")
    return "vllm"


def chooses_by_count(kind: str, options: SamplerOptions, engines: Engines | None = None) -> bool:
    """Whether the number of answers decides, and so must be known first: on a CPU, where vLLM takes 17 to 40 seconds
    to start. Arguments of vLLM's are for vLLM."""
    here = importlib.util.find_spec("vllm") is not None and is_cpu_build()
    return kind == "auto" and engines is None and not options.extra and here


def choose_reason_against_vllm(options: SamplerOptions) -> str | None:
    """Why vLLM cannot serve this model with these adapters; None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    from ema_scale.inference.vllm_sampler import reason_against

    return reason_against(options)


# Arguments of vllm.LLM that say where and how fast tokens are computed, not which: they move no more than float
# rounding. One that is not listed is taken to matter; max_model_len does, because it cuts answers.
NEUTRAL = frozenset(
    """
    tensor_parallel_size pipeline_parallel_size prefill_context_parallel_size decode_context_parallel_size
    data_parallel_size data_parallel_backend enable_expert_parallel enable_eplb eplb_config distributed_executor_backend
    disable_custom_all_reduce master_addr master_port nnodes node_rank distributed_timeout_seconds device_ids numa_bind
    numa_bind_nodes numa_bind_cpus max_parallel_loading_workers
    gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override block_size swap_space cpu_offload_gb
    cpu_offload_params offload_backend offload_group_size offload_num_in_group offload_prefetch_step offload_params
    kv_offloading_size kv_offloading_backend
    max_num_seqs max_num_batched_tokens max_num_scheduled_tokens max_num_partial_prefills long_prefill_token_threshold
    enable_chunked_prefill enable_prefix_caching prefix_caching_hash_algo scheduling_policy async_scheduling
    stream_interval
    enforce_eager compilation_config cudagraph_capture_sizes max_cudagraph_capture_size optimization_level
    enable_lora max_loras max_cpu_loras max_lora_rank fully_sharded_loras max_logprobs
    download_dir safetensors_load_strategy use_tqdm_on_load hf_token trust_remote_code
    disable_log_stats aggregate_engine_logging logging_config log_level log_config_file show_hidden_metrics_for_version
    otlp_traces_endpoint collect_detailed_traces enable_sleep_mode seed
    """.split()
)


def engine_cache_key(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of vllm.LLM that change what the model says: quantization, dtype, tokenizer, ..."""
    return {name: value for name, value in engine.items() if value is not None and name not in NEUTRAL}


def sampler_cache_key(sampler: str, settings: EvaluationRecipe, model: str, adapter: Path | None) -> dict[str, Any]:
    """Of the sampler of that name, for the base model (`adapter=None`) at `model` or for an adapter's folder."""
    if sampler == "vllm":
        engine = engine_cache_key(settings.engine)
        return {"engine": engine} if engine else {}
    if sampler != "openai":
        return {}
    from ema_scale.inference.openai_sampler import adapter_name

    endpoint = settings.endpoint
    default = model if adapter is None else adapter_name(str(adapter))
    served = (endpoint.served or model) if adapter is None else endpoint.names.get(default, default)
    # Not by its address: a server moves, from node to node and port to port, and remains the same model.
    key: dict[str, Any] = {"served": served} if served != default else {}
    if not endpoint.send_all_settings:
        key["sampling"] = "the server's defaults"
    return key | ({"extra_body": endpoint.extra_body} if endpoint.extra_body else {})
