"""Sampling with vLLM: one engine, the base and every adapter in the same batches, answers as they finish."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ema_scale.choices.margins import Likelihood
from ema_scale.choices.tokens import AnswerTokens
from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.inference.base import (
    NEUTRAL_SAMPLING,
    SampleRequest,
    SampleResult,
    SamplerOptions,
    ScoreRequest,
    ScoreResult,
    too_long,
)
from ema_scale.inference.chat_prompts import Prompts, load_config
from ema_scale.inference.engine_log import output_to
from ema_scale.inference.vllm_engine import (
    VllmEngine,
    Work,
    engine_dtype,
    environment_restored,
    is_cpu_build,
    prepare_environment,
)
from ema_scale.models.weights import check_adapter, skeleton_of

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_LORAS_IN_A_BATCH = 8
MAX_LORAS_IN_MEMORY = 64  # those of a large study are read from disk as their turn comes


def reason_against(options: SamplerOptions) -> str | None:
    """Why vLLM cannot run this model with these adapters, or None. Loads the config, not the weights.

    Raises UserError if there is no such model.
    """
    config = load_config(options.model)
    architectures = list(config.architectures or [])
    quiet = output_to(options.log_file) if options.log_file else contextlib.nullcontext()
    with environment_restored(), quiet:
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
    config = read_json(path, "the adapter's config")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise UserError(f"{path}: found peft_type {config.get('peft_type')!r}, expected LORA and a rank r")
    return max([config["r"], *(int(r) for r in (config.get("rank_pattern") or {}).values())])


def engine_rank(adapters: Iterable[str]) -> int:
    """The smallest rank vLLM can be built for that holds every adapter. Raises UserError above its limit."""
    largest = max(map(adapter_rank, adapters))
    for rank in LORA_RANKS:
        if largest <= rank:
            return rank
    raise UserError(f"adapter rank {largest} is above vLLM's {LORA_RANKS[-1]}; use sampler: transformers")


@dataclass(frozen=True)
class _AnswerRow:
    """One answer to score.

    alone: without its question.
    counts: tokens of each answer of the request.
    rows: how many rows the request has.
    """

    request: ScoreRequest
    alone: bool
    index: int
    tokens: AnswerTokens
    counts: tuple[int, ...]
    rows: int


class VllmSampler:
    """One vLLM engine for a base model and its LoRA adapters. Close it to give memory and settings back."""

    name = "vllm"

    def __init__(self, options: SamplerOptions) -> None:
        self.options = options
        self.dtype = engine_dtype(options.model)
        self._prompts = Prompts(options.model)
        self._ids = {path: index for index, path in enumerate(options.adapters, start=1)}
        if options.adapters:
            skeleton = skeleton_of(
                options.model.path,
                revision=options.model.revision,
                trust_remote_code=options.model.trust_remote_code,
            )
            for adapter in options.adapters:
                check_adapter(adapter, skeleton)
        self._engine = VllmEngine(options.model, sampler_settings(options), options.extra, options.log_file)
        if options.adapters and is_cpu_build():
            self._check_cpu_lora()
        self.max_model_len = self._engine.max_model_len

    @staticmethod
    def _check_cpu_lora() -> None:
        from ema_scale.inference import vllm_cpu_lora

        # The entry point has done this unless VLLM_PLUGINS or an old install left it out.
        vllm_cpu_lora.register()
        if not vllm_cpu_lora.base_rows_are_untouched():
            raise RuntimeError("vLLM's CPU LoRA would give base rows an adapter; refusing to sample")

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Feed the engine as it drains and yield every request when its last answer is done."""
        refused: list[SampleResult] = []
        for request, output in self._engine.stream(self._work(requests, refused)):
            yield from _drained(refused)
            yield self._result(request, output)
        yield from _drained(refused)

    def _work(self, requests: Iterable[SampleRequest], refused: list[SampleResult]) -> Iterator[Work[SampleRequest]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for request in requests:
            prompt = self._prompts.ids(request.messages, request.date)
            if len(prompt) >= self.max_model_len:
                refused.append(too_long(request))
                continue
            params = SamplingParams(
                n=request.n,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                max_tokens=min(request.max_tokens, self.max_model_len - len(prompt)),
                stop_token_ids=self._prompts.stops,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                **NEUTRAL_SAMPLING,
            )
            yield Work(request, prompt, params, self._lora(request.adapter), request.n)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """One request per answer, read from the log-probabilities of its prompt; yielded as questions are done."""
        totals: dict[str, dict[tuple[bool, int], float]] = {}
        for row, output in self._engine.stream(self._answers(requests)):
            found = totals.setdefault(row.request.key, {})
            found[row.alone, row.index] = _prompt_total(output, row.tokens)
            if len(found) == row.rows:
                done = totals.pop(row.request.key)
                yield ScoreResult(
                    row.request.key,
                    tuple(Likelihood(done[False, i], count, done.get((True, i))) for i, count in enumerate(row.counts)),
                )

    def _answers(self, requests: Iterable[ScoreRequest]) -> Iterator[Work[_AnswerRow]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        for request in requests:
            behind, bare = self._prompts.answers(request, self.max_model_len - 1)  # one token is always sampled
            counts = tuple(row.count for row in behind)
            for alone, rows in ((False, behind), (True, bare)):
                for index, tokens in enumerate(rows):
                    row = _AnswerRow(request, alone, index, tokens, counts, len(behind) + len(bare))
                    yield Work(row, tokens.ids, params, self._lora(request.adapter))

    def _lora(self, adapter: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        return None if adapter is None else LoRARequest(adapter, self._ids[adapter], adapter)

    def _result(self, request: SampleRequest, output: Any) -> SampleResult:
        outputs = sorted(output.outputs, key=lambda o: o.index)
        opening = self._prompts.opening(output.prompt_token_ids)
        return SampleResult(
            key=request.key,
            texts=tuple(opening + self._prompts.text(o.token_ids) for o in outputs),
            finish_reasons=tuple(str(o.finish_reason) for o in outputs),
            token_counts=tuple(len(o.token_ids) for o in outputs),
        )

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": metadata.version("vllm-cpu" if is_cpu_build() else "vllm"),
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
        } | ({"engine": self.options.extra} if self.options.extra else {})

    def close(self) -> None:
        """Shut the engine down. Calling it again does nothing."""
        self._engine.close()

    def __enter__(self) -> VllmSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _prompt_total(output: Any, row: AnswerTokens) -> float:
    """The sum of the log-probabilities of the scored tokens of a prompt."""
    steps = zip(output.prompt_logprobs[row.start :], row.ids[row.start :], strict=True)
    return math.fsum(step[token].logprob for step, token in steps)


def _drained(refused: list[SampleResult]) -> Iterator[SampleResult]:
    while refused:
        yield refused.pop(0)


def sampler_settings(options: SamplerOptions) -> dict[str, Any]:
    """What sampling from this model with these adapters asks of the engine."""
    settings: dict[str, Any] = {"seed": options.seed, "max_model_len": options.max_model_len}
    if options.adapters:
        settings |= {
            "enable_lora": True,
            "max_loras": min(len(options.adapters), MAX_LORAS_IN_A_BATCH),
            "max_cpu_loras": min(len(options.adapters), MAX_LORAS_IN_MEMORY),
            "max_lora_rank": engine_rank(options.adapters),
        }
    return settings
