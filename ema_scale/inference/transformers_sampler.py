"""Sampling with transformers and PEFT: for models that vLLM cannot serve, and where it is not installed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ema_scale.choices.likelihood import Inputs, Scorer, target_likelihoods
from ema_scale.choices.margins import Likelihood
from ema_scale.choices.tokens import AnswerTokens
from ema_scale.core.errors import UserError
from ema_scale.inference.base import (
    NEUTRAL_SAMPLING,
    SampleRequest,
    SampleResult,
    SamplerOptions,
    ScoreRequest,
    ScoreResult,
    too_long,
)
from ema_scale.inference.chat_prompts import Prompts
from ema_scale.models.layout import ModelLayout
from ema_scale.models.load import load_base
from ema_scale.models.lora import with_adapters

if TYPE_CHECKING:
    from torch import Tensor

BATCH_SIZE = 32
BATCHES_SORTED_TOGETHER = 8
QUESTIONS_SCORED_TOGETHER = 128


@dataclass(frozen=True)
class _Row:
    """One answer still to be drawn."""

    request: SampleRequest
    index: int
    prompt: tuple[int, ...]

    @property
    def group(self) -> tuple[str, int]:
        return self.request.adapter or "", self.request.max_tokens


class SeededSampling(LogitsProcessor):
    """Turns greedy search into sampling with one random stream a row, by the Gumbel-max trick.

    argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T). `generate` itself draws a whole
    batch from one stream: an answer would depend on its neighbours and on what a resumed run did before.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        temperatures: Sequence[float],
        top_ps: Sequence[float],
        device: torch.device,
    ) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperatures, self.top_ps = temperatures, top_ps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V], float: next-token logits; returns noisy ones (greedy rows, T = 0, as they are)."""
        scores = scores.float()
        for row, generator in enumerate(self.generators):
            temperature = self.temperatures[row]
            if temperature == 0:
                continue
            logits = keep_top_p(scores[row] / temperature, self.top_ps[row])
            exponential = torch.empty_like(logits).exponential_(generator=generator)
            scores[row] = logits - exponential.log()
        return scores


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """logits [V] with -inf outside the smallest set of tokens whose probability reaches `top_p`."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(outside.scatter(0, order, outside), float("-inf"))


class TransformersSampler:
    """A base model in this process; adapters are switched between batches."""

    name = "transformers"

    def __init__(self, options: SamplerOptions) -> None:
        model = options.model
        self.batch_size = int(options.extra.get("batch_size", BATCH_SIZE))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = model.dtype
        if self.dtype == "auto":
            self.dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        self._prompts = Prompts(model)
        base = load_base(model.model_copy(update={"dtype": self.dtype}))
        text = base.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        self.max_model_len = min(x for x in (limit, options.max_model_len, 1 << 30) if x)
        self._stops = self._prompts.stops
        # A checkpoint's own defaults (a repetition penalty, say) would fill whatever a call leaves open.
        base.generation_config = GenerationConfig()
        self._names = {path: f"adapter_{index}" for index, path in enumerate(options.adapters)}
        named = {name: path for path, name in self._names.items()}
        self._model: Any = with_adapters(base, named).to(self.device).eval()

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        """Draw in batches of similar length and yield every request when its last answer is done."""
        waiting = iter(requests)
        while chunk := list(itertools.islice(waiting, self.batch_size * BATCHES_SORTED_TOGETHER)):
            rows: list[_Row] = []
            done: dict[int, dict[int, tuple[str, str, int]]] = {}
            for request in chunk:
                prompt = tuple(self._prompts.ids(request.messages, request.date))
                if len(prompt) >= self.max_model_len:
                    yield too_long(request)
                    continue
                done[id(request)] = {}
                rows += [_Row(request, index, prompt) for index in range(request.n)]
            rows.sort(key=lambda row: (row.group, len(row.prompt)))
            for _, group in itertools.groupby(rows, key=lambda row: row.group):
                for batch in _batches(group, self.batch_size):
                    for row, answer in zip(batch, self._draw(batch), strict=True):
                        answers = done[id(row.request)]
                        answers[row.index] = answer
                        if len(answers) == row.request.n:
                            ordered = [answers[i] for i in range(row.request.n)]
                            texts, reasons, counts = zip(*ordered, strict=True)
                            yield SampleResult(row.request.key, texts, reasons, counts)

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
                with self._adapter(adapter):
                    encoded = [self._prompts.answers(request, self.max_model_len) for request in those]
                    behind = _totals(scorer, [row for rows, _ in encoded for row in rows])
                    alone = _totals(scorer, [row for _, rows in encoded for row in rows])
                for request, (rows, bare) in zip(those, encoded, strict=True):
                    yield ScoreResult(
                        request.key,
                        tuple(Likelihood(next(behind), row.count, next(alone) if bare else None) for row in rows),
                    )

    @torch.inference_mode()
    def _draw(self, batch: Sequence[_Row]) -> list[tuple[str, str, int]]:
        """(text, finish reason, tokens) of each row; the rows share adapter and token limit."""
        requests = [row.request for row in batch]
        longest = max(len(row.prompt) for row in batch)
        pad = self._prompts.tokenizer.pad_token_id
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, longest - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[i, longest - len(row.prompt) :] = 1
        processor = SeededSampling(
            [row.request.seed + row.index for row in batch],
            [r.temperature for r in requests],
            [r.top_p for r in requests],
            self.device,
        )
        limits = [
            min(r.max_tokens, self.max_model_len - len(row.prompt)) for r, row in zip(requests, batch, strict=True)
        ]
        settings = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=False,
            eos_token_id=self._stops,
            pad_token_id=pad,
            use_cache=True,
            repetition_penalty=NEUTRAL_SAMPLING["repetition_penalty"],
        )
        with self._adapter(requests[0].adapter):
            out = self._model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([processor]),
            )
        drawn = zip(batch, out[:, longest:].tolist(), limits, strict=True)
        return [self._cut(row.prompt, tokens, limit) for row, tokens, limit in drawn]

    def _cut(self, prompt: Sequence[int], tokens: list[int], limit: int) -> tuple[str, str, int]:
        end = next((i for i, token in enumerate(tokens[:limit]) if token in self._stops), None)
        kept = tokens[:limit] if end is None else tokens[: end + 1]
        text = self._prompts.opening(prompt) + self._prompts.text(kept)
        return text, "length" if end is None else "stop", len(kept)

    def _adapter(self, path: str | None) -> Any:
        if not self._names:
            return contextlib.nullcontext()
        if path is None:
            return self._model.disable_adapter()
        self._model.set_adapter(self._names[path])
        return contextlib.nullcontext()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": metadata.version("transformers"),
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
        }

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        self._model = None
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


def _batches(rows: Iterable[_Row], size: int) -> Iterator[list[_Row]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch
