"""Sampling with transformers and PEFT: for models that vLLM cannot serve, and where it is not installed."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from ema_scale.choices.likelihood import Inputs, Scorer, target_likelihoods
from ema_scale.choices.margins import Likelihood
from ema_scale.choices.tokens import AnswerTokens
from ema_scale.core.errors import UserError
from ema_scale.inference.answer_batch import Answer, AnswerBatches
from ema_scale.inference.base import (
    SampleRequest,
    SampleResult,
    SamplerOptions,
    ScoreRequest,
    ScoreResult,
    too_long,
)
from ema_scale.inference.chat_prompts import Prompts
from ema_scale.inference.cpu import cpu_threads
from ema_scale.models.layout import ModelLayout
from ema_scale.models.load import load_base
from ema_scale.models.lora import with_adapters

if TYPE_CHECKING:
    from torch import Tensor

BATCH_SIZE = 32
BATCHES_SORTED_TOGETHER = 8
QUESTIONS_SCORED_TOGETHER = 128


class TransformersSampler:
    """A base model in this process; adapters are switched between batches."""

    name = "transformers"

    def __init__(self, options: SamplerOptions) -> None:
        model = options.model
        self.batch_size = int(options.extra.get("batch_size", BATCH_SIZE))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._threads = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(cpu_threads(model))
        self._prompts = Prompts(model)
        base = load_base(model)
        self.dtype = str(base.dtype).removeprefix("torch.")
        text = base.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        self.max_model_len = min(x for x in (limit, options.max_model_len, 1 << 30) if x)
        # A checkpoint's own defaults (a repetition penalty, say) would fill whatever a call leaves open.
        base.generation_config = GenerationConfig()
        self._names = {path: f"adapter_{index}" for index, path in enumerate(options.adapters)}
        named = {name: path for path, name in self._names.items()}
        self._model: Any = with_adapters(base, named).to(self.device).eval()
        self._in_use: str | None = ""  # it is not known which adapter is
        pad = self._prompts.tokenizer.pad_token_id
        self._batches = AnswerBatches(self._model, self._prompts.stops, pad, self.batch_size)

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Draw in batches, a prompt once for its answers; yields every request when its last answer is done."""
        waiting = iter(requests)
        while chunk := list(itertools.islice(waiting, self.batch_size * BATCHES_SORTED_TOGETHER)):
            answers: list[Answer] = []
            own: dict[int, list[Answer]] = {}
            ended: Counter[int] = Counter()
            for request in chunk:
                prompt = tuple(self._prompts.ids(request.messages, request.date))
                limit = min(request.max_tokens, self.max_model_len - len(prompt))
                if limit < 1:
                    yield too_long(request)
                    continue
                own[id(request)] = [Answer(request, index, prompt, limit) for index in range(request.n)]
                answers += own[id(request)]
            answers.sort(key=lambda one: (one.request.adapter or "", len(one.prompt), one.prompt))
            for path, group in itertools.groupby(answers, key=lambda one: one.request.adapter):
                for answer in self._batches.draw(list(group), functools.partial(self._use, path)):
                    request = answer.request
                    ended[id(request)] += 1
                    if ended[id(request)] == request.n:
                        yield self._result(request, own[id(request)])

    def _result(self, request: SampleRequest, answers: Sequence[Answer]) -> SampleResult:
        """answers: to this request, in the order of their seeds."""
        opening = self._prompts.opening(answers[0].prompt)
        return SampleResult(
            request.key,
            tuple(opening + self._prompts.text(one.tokens) for one in answers),
            tuple(one.finish_reason for one in answers),
            tuple(len(one.tokens) for one in answers),
        )

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Score adapter after adapter, in batches that share what their questions have in common."""
        layout = ModelLayout.of(self._model, adapters=False)
        head_module = layout.core.get_output_embeddings()
        if hasattr(head_module, "_disable_adapters"):
            raise UserError(
                "an adapter changes the head, so written answers cannot be scored with transformers; use vllm"
            )

        def forward(inputs: Inputs) -> Tensor:
            out = layout.backbone(**inputs.arguments())
            return target_likelihoods(out[0], inputs.targets, layout.head())

        scorer = Scorer(forward, layout.core.config, self.device)
        waiting = iter(requests)
        while chunk := list(itertools.islice(waiting, QUESTIONS_SCORED_TOGETHER)):
            by_adapter: dict[str | None, list[ScoreRequest]] = {}
            for request in chunk:
                by_adapter.setdefault(request.adapter, []).append(request)
            for adapter, those in by_adapter.items():
                self._use(adapter)
                encoded = [self._prompts.answers(request, self.max_model_len) for request in those]
                behind = _totals(scorer, [row for rows, _ in encoded for row in rows])
                alone = _totals(scorer, [row for _, rows in encoded for row in rows])
                for request, (rows, bare) in zip(those, encoded, strict=True):
                    yield ScoreResult(
                        request.key,
                        tuple(Likelihood(next(behind), row.count, next(alone) if bare else None) for row in rows),
                    )

    def _use(self, path: str | None) -> None:
        """Switch to the adapter of that folder, or to none, if another is in use: it takes milliseconds."""
        if not self._names or path == self._in_use:
            return
        if path is None:
            self._model.base_model.disable_adapter_layers()
        else:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(self._names[path])
        self._in_use = path

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": metadata.version("transformers"),
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
        }

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        self._model = self._batches = None  # type: ignore[assignment]
        torch.set_num_threads(self._threads)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> TransformersSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _totals(scorer: Scorer, rows: Sequence[AnswerTokens]) -> Iterator[float]:
    """The log-likelihoods of the rows, in their order."""
    found = dict(scorer.totals(rows))
    return iter([found[i] for i in range(len(rows))])
