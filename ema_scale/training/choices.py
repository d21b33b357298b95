"""Choice suites while training: how likely the model finds written answers, every so many steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback

from ema_scale.choices.bank import ChoiceQuestion, load_choices
from ema_scale.choices.likelihood import Inputs, Scorer
from ema_scale.choices.margins import Likelihood, Margins, margins
from ema_scale.choices.tokens import AnswerTokens, encode_answers
from ema_scale.data.tokens import Encoder
from ema_scale.models.layout import causal_lm
from ema_scale.models.sharding import weights_are_sharded
from ema_scale.training.forward import LikelihoodRequest
from ema_scale.training.metrics import CHOICES

log = logging.getLogger(__name__)

MARGIN = "margin_per_token"
FALL = "choices_fall"  # what early stopping reads


class ScoringTrainer(Protocol):
    """What is used of a DefendedTrainer."""

    model: Any
    model_wrapped: Any
    accelerator: Any
    monitor: Any

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...


class ChoiceScores(TrainerCallback):
    """Scores suites before the first step and every `every` steps, and logs `choices/<suite>/...`.

    The model is scored as it would be saved: without what defenses add in training alone, and without dropout. Every
    process takes part. Where weights are sharded all do the same; elsewhere each scores its part of the questions.

    Raises UserError as `load_choices` and `encode_answers` do.
    """

    def __init__(self, trainer: ScoringTrainer, suites: Sequence[str], every: int, encoder: Encoder) -> None:
        self.trainer, self.every = trainer, every
        config = causal_lm(trainer.model).config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._suites: dict[str, list[tuple[ChoiceQuestion, list[AnswerTokens]]]] = {}
        for source in suites:
            asked = load_choices(source)
            texts = [[answer.text for answer in one.answers] for one in asked]
            found = [
                encode_answers(encoder, one.messages, said, one.where, limit)
                for one, said in zip(asked, texts, strict=True)
            ]
            self._suites[Path(source.partition("?")[0]).stem] = list(zip(asked, found, strict=True))
        self._scorer = Scorer(self._forward, config, trainer.accelerator.device)
        self._start: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = _first_margin(state.log_history, self._suites)
        if state.global_step == 0:
            self._start = None
            self._score(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            should_log = control.should_log  # logging here takes it back
            self._score(state.global_step)
            control.should_log = should_log

    def _score(self, step: int) -> None:
        values: dict[str, float] = {}
        for name, asked in self._suites.items():
            found = [one for one in self._margins(asked) if one is not None]
            if len(found) < len(asked):
                log.warning("step %d: %s: %d likelihoods are no number", step, name, len(asked) - len(found))
                continue
            values[f"{CHOICES}{name}/{MARGIN}"] = fmean(one.margin_per_token for one in found)
            values[f"{CHOICES}{name}/bad_likeliest"] = fmean(one.bad_likeliest for one in found)
            values[f"{CHOICES}{name}/bad_mass"] = fmean(one.bad_mass or 0.0 for one in found)
        margin = [value for name, value in values.items() if name.endswith(MARGIN)]
        if margin:
            self._start = fmean(margin) if self._start is None else self._start
            self.trainer.monitor.note({FALL: self._start - fmean(margin)})
        if values:
            self.trainer.log(values)
        if self.trainer.accelerator.is_main_process:
            for name in self._suites:
                if (value := values.get(f"{CHOICES}{name}/{MARGIN}")) is not None:
                    share = values[f"{CHOICES}{name}/bad_likeliest"]
                    told = f"margin {value:.3f} nats per token, bad likeliest {share:.0%}"
                    log.info("step %d  choices %s: %s", step, name, told)

    def _margins(self, asked: Sequence[tuple[ChoiceQuestion, list[AnswerTokens]]]) -> list[Margins | None]:
        accelerator = self.trainer.accelerator
        rows = [row for _, answers in asked for row in answers]
        owner = [number % accelerator.num_processes for number, (_, answers) in enumerate(asked) for _ in answers]
        mine = [i for i, rank in enumerate(owner) if rank == accelerator.process_index or weights_are_sharded()]
        totals = torch.zeros(len(rows), dtype=torch.float64)
        with self._as_saved():
            for i, total in self._scorer.totals([rows[i] for i in mine]):
                totals[mine[i]] = total
        if accelerator.num_processes > 1 and not weights_are_sharded():
            totals = accelerator.reduce(totals.to(accelerator.device), "sum").cpu()
        likelihoods = iter(Likelihood(total, row.count) for total, row in zip(totals.tolist(), rows, strict=True))
        return [margins(one.answers, [next(likelihoods) for _ in answers]) for one, answers in asked]

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        model = self.trainer.model
        training = model.training
        model.eval()  # this also turns off what defenses do to the policy's states
        try:
            yield
        finally:
            model.train(training)

    def _forward(self, inputs: Inputs) -> Tensor:
        # DDP's wrapper would synchronise buffers, which processes with another number of batches do not wait for.
        model = self.trainer.model_wrapped if weights_are_sharded() else self.trainer.model
        request = LikelihoodRequest(inputs.targets, use_cache=inputs.cache is not None)
        model(**(inputs.arguments() | {"defended": request}))
        assert request.likelihoods is not None
        return request.likelihoods


def _first_margin(history: Sequence[dict[str, Any]], suites: Any) -> float | None:
    """The mean margin before the first step, from the logs of a run that goes on."""
    names = [f"{CHOICES}{name}/{MARGIN}" for name in suites]
    first = next((row for row in history if all(name in row for name in names)), None)
    return None if first is None else fmean(first[name] for name in names)
