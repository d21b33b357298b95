"""What a sampler is: requests in, finished answers out, in any order and as they finish."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ema_scale.config.sections import EndpointRecipe, ModelRecipe

log = logging.getLogger(__name__)

PROMPT_TOO_LONG = "prompt_too_long"


@dataclass(frozen=True)
class SampleRequest:
    """`n` answers to one conversation by the base model (`adapter=None`) or by the adapter in that folder.

    Answer i is drawn with seed `seed + i` and depends on nothing else: not on n, the batch, or the order.
    (Float rounding may differ between batch shapes, so that very rarely a token at a near-tie differs.)
    """

    key: str
    messages: tuple[dict[str, str], ...]
    adapter: str | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 600
    seed: int = 0


@dataclass(frozen=True)
class SampleResult:
    """The answers to one request, in the order of their seeds.

    finish_reasons: "stop", "length", or PROMPT_TOO_LONG (then every text is empty).
    """

    key: str
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    token_counts: tuple[int, ...]


class Sampler(Protocol):
    """Holds one base model and serves it with any of the adapters it was made for."""

    name: str

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]: ...

    def describe(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SamplerOptions:
    """What samplers need to know. `max_model_len`: prompt plus answer, in tokens (None: the model's).

    extra: further arguments of vllm.LLM; endpoint: for `openai`. log_file: takes an engine's own messages.
    """

    model: ModelRecipe
    adapters: tuple[str, ...] = ()
    max_model_len: int | None = None
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    endpoint: EndpointRecipe | None = None
    log_file: Path | None = None


def too_long(request: SampleRequest) -> SampleResult:
    """The result for a prompt that leaves no room for an answer."""
    n = request.n
    return SampleResult(request.key, ("",) * n, (PROMPT_TOO_LONG,) * n, (0,) * n)
