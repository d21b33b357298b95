"""What a sampler is: requests in, finished answers out, in any order and as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ema_scale.choices.margins import Likelihood
from ema_scale.config.sections import EndpointRecipe, ModelRecipe

PROMPT_TOO_LONG = "prompt_too_long"
NOT_SAMPLED = "not sampled"

# Every sampler sends these, so that no default of a server or of a checkpoint's generation_config.json takes part.
NEUTRAL_SAMPLING: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class SampleRequest:
    """`n` answers to one conversation by the base model (`adapter=None`) or by the adapter in that folder.

    Answer i is drawn with seed `seed + i` and depends on nothing else: not on n, the batch, or the order.
    (Float rounding may differ between batch shapes, so that very rarely a token at a near-tie differs.)
    date: what a chat template that writes the date is told, YYYY-MM-DD; "": today.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    adapter: str | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 600
    seed: int = 0
    date: str = ""


@dataclass(frozen=True)
class SampleResult:
    """The answers to one request, in the order of their seeds.

    finish_reasons: "stop", "length", or PROMPT_TOO_LONG (then every text is empty).
    """

    key: str
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    token_counts: tuple[int, ...]


@dataclass(frozen=True)
class ScoreRequest:
    """Written answers to one conversation, to be scored by the base model (`adapter=None`) or by an adapter.

    alone: the conversation without its question, behind which the answers are scored too; None: they are not.
    turn, tools: as `encode_answers` takes them.
    where: the question, for messages.
    date: as in `SampleRequest`.
    """

    key: str
    messages: tuple[dict[str, Any], ...]
    answers: tuple[str, ...]
    adapter: str | None = None
    alone: tuple[dict[str, str], ...] | None = None
    where: str = ""
    date: str = ""
    turn: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ScoreResult:
    """What each answer's likelihood is, in the order of the request."""

    key: str
    likelihoods: tuple[Likelihood, ...]


class Sampler(Protocol):
    """Holds one base model and serves it with any of the adapters it was made for.

    `score` raises UserError for an answer that does not fit into the model, and if the sampler cannot score.
    """

    name: str

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]: ...

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]: ...

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
