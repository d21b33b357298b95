"""What a sampler is: requests in, finished answers out, in any order and as they finish."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

from ema_scale.core.errors import UserError
from ema_scale.inference.base import Sampler, SamplerOptions

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


def make_sampler(kind: str, options: SamplerOptions) -> Sampler:
    """`vllm`, `transformers`, `openai`, or `auto`: vLLM if it is installed and can run this model with adapters.

    Raises UserError if vLLM is asked for and cannot serve the model, naming why.
    """
    if kind not in ("auto", "vllm", "transformers", "openai"):
        raise UserError(f"evaluation.sampler: found {kind!r}, expected auto, vllm, transformers or openai")
    if kind == "openai":
        from ema_scale.inference.openai_sampler import OpenAISampler

        return OpenAISampler(options)
    if kind != "transformers":
        reason = choose_reason_against_vllm(options)
        if reason is None:
            from ema_scale.inference.vllm_sampler import VllmSampler

            return VllmSampler(options)
        if kind == "vllm":
            raise UserError(f"evaluation.sampler: vllm cannot serve this model: {reason}; use transformers")
        log.warning("sampling with transformers, not vLLM: %s", reason)
    from ema_scale.inference.transformers_sampler import TransformersSampler

    return TransformersSampler(options)


def sampler_name(kind: str, options: SamplerOptions) -> str:
    """The sampler that `make_sampler` would make, without loading a model."""
    if kind == "auto":
        return "transformers" if choose_reason_against_vllm(options) else "vllm"
    return kind


def choose_reason_against_vllm(options: SamplerOptions) -> str | None:
    """Why vLLM cannot serve this model with these adapters; None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    from ema_scale.inference.vllm_sampler import reason_against

    return reason_against(options)
