"""Suites of questions, samplers, judges, and rates with honest intervals.

    evaluate([EvalTarget("base", None, out)], model, suites, settings) -> {name: summary}

Nothing heavy is imported here until it is asked for: vLLM imports this package to find its CPU LoRA plugin
(`vllm_cpu_lora`) in each of its processes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ema_scale.evaluation.plan import EvalTarget
    from ema_scale.evaluation.run import evaluate, load_suites
    from ema_scale.evaluation.sampler import make_sampler
    from ema_scale.evaluation.suite import Suite, load_suite

_HOMES = {
    "EvalTarget": "plan",
    "Suite": "suite",
    "evaluate": "run",
    "load_suite": "suite",
    "load_suites": "run",
    "make_sampler": "sampler",
}

__all__ = ["EvalTarget", "Suite", "evaluate", "load_suite", "load_suites", "make_sampler"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
