"""DefendedTrainer: transformers' Trainer with defenses.

    trainer = DefendedTrainer(model, args, rows, defenses=[KL(0.1), Interleaving("safe.jsonl", 0.05)])
    trainer.train()
    trainer.save_model("adapter")

Cross-entropy is the mean over assistant tokens, every other term the mean over the tokens of its own token set. Both
are over the whole optimizer step: all accumulated micro-batches on all processes. Splitting a step differently changes
nothing but rounding. docs/life_of_a_step.md follows one step through the code.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date as Date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ema_scale.core.errors import UserError
from ema_scale.core.records import DataReport
from ema_scale.data.packing import texts
from ema_scale.data.tokens import Encoder, load_tokenizer
from ema_scale.defenses.base import Defense, FinishContext
from ema_scale.defenses.registry import adapter_files, parse, steps_per_drift_reading
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.defenses.terms import Divergence, TokenSet, TokenTerm
from ema_scale.models.lora import save_adapter, with_adapter
from ema_scale.models.side_adapters import SideAdapters
from ema_scale.training import reference_setup
from ema_scale.training.apart import ApartGradients
from ema_scale.training.arguments import check_arguments, offload_activations
from ema_scale.training.callbacks import DefenseObserver, StepHooks, StopFlag
from ema_scale.training.checkpointing import CheckpointMixin
from ema_scale.training.choices import ChoiceScores
from ema_scale.training.data import check_vocabulary, prepare_data
from ema_scale.training.dataloading import DataMixin
from ema_scale.training.distributed import FSDPMixin, check_world, shard_by_layer
from ema_scale.training.forward import DefendedForward, LossRequest
from ema_scale.training.metrics import Monitor, utilisation_per_token
from ema_scale.training.reference_setup import ReferenceContext, ReferenceSpec
from ema_scale.training.token_masks import attention_mask_of

log = logging.getLogger(__name__)

DRIFT_LAYERS = 8  # how many layers a drift reading covers, evenly spread


class DefendedTrainer(DataMixin, CheckpointMixin, FSDPMixin, Trainer):
    """A Trainer for a LoRA adapter under any number of defenses.

    model: a PeftModel, or a causal LM, its folder or its hub id. A path is loaded as `load_base` does, in bfloat16
        where the GPU has it. A model without an adapter gets `peft_config` (default: the paper's LoRA).
    train_dataset: see `data.prepare_data`. An eval_dataset is prepared like it, but not packed, and without the rows
        and prompts of defenses.
    reference: auto, adapter_off, two_stream, cached, or {"kind": "separate", "model": ...}.
    processing_class: the tokenizer. Default: the one beside the model.
    max_length: rows are cut to so many tokens. Default: that of `args` if it is TRL's SFTConfig, else 2048.
    packing: rows are put into sequences of up to max_length tokens, which a batch size then counts. Default: that of
        `args` if it is TRL's SFTConfig, else no packing.
    drift_every: steps between readings of the distance to the reference; 0: none. A reading runs the reference, even
        if no defense does. The first and the last step have one.
    reference_runs: how many trainings, this one included, read the reference of these rows and can share a cache.
    on_bad: what to do with a bad row: raise or drop.
    token_cache: a folder in which trainings find what others have tokenized.
    template_date: what a chat template that writes the date is told. Default: today.
    choice_suites: banks with written answers that are scored before the first step and every `choices_every` steps.

    All other arguments are transformers.Trainer's. `reference_choice` says which reference is used, and why;
    `stopped_early` says why a defense ended the training.

    Raises UserError for what cannot be trained correctly: see `ModelLayout.of`, `prepare_data`, `check_world` and
    `check_arguments`.
    """

    model: Any
    observer: DefenseObserver
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        defenses: Sequence[Defense | Mapping[str, Any] | str] = (),
        reference: ReferenceSpec = "auto",
        processing_class: Any = None,
        max_length: int | None = None,
        *,
        peft_config: Any = None,
        packing: bool | None = None,
        drift_every: int = 100,
        reference_runs: int = 1,
        on_bad: str = "raise",
        token_cache: Path | None = None,
        template_date: Date | None = None,
        choice_suites: Sequence[str] = (),
        choices_every: int = 25,
        **kwargs: Any,
    ) -> None:
        args = check_arguments(args, train_dataset=train_dataset, **kwargs)
        self.defenses = parse(list(defenses))
        self.row_groups = RowGroups.of(self.defenses)
        self.drift_every = steps_per_drift_reading(drift_every, self.defenses)
        self.reference_runs = reference_runs
        self.monitor = Monitor()
        self.stop = StopFlag()
        self.on_reference_changed: Callable[[], None] = lambda: None
        self._empty_token_sets: set[TokenSet] = set()  # of the current step
        self._utilisation: float | None = None

        # Model and tokenizer.
        trusted = getattr(args, "trust_remote_code", False)  # SFTConfig's; for what is loaded here
        model = with_adapter(
            model, peft_config, seed=args.seed, trained=train_dataset is not None, trust_remote_code=trusted
        )
        beside = self.row_groups.side_adapters
        side = SideAdapters(model, beside, seed=args.seed) if beside and train_dataset is not None else None
        path = model.get_base_model().config._name_or_path
        tokenizer = processing_class or load_tokenizer(path, trust_remote_code=trusted)

        # Rows.
        self.data_report = DataReport()
        self.prepare_options = {
            # SFTConfig's None: rows are not cut.
            "max_length": getattr(args, "max_length", 2048) if max_length is None else max_length,
            "seed": args.seed,
            "on_bad": on_bad,
            "token_cache": token_cache,
            "date": template_date,
        }
        if train_dataset is not None:
            packing = getattr(args, "packing", False) if packing is None else packing
            train_dataset, self.data_report = prepare_data(
                train_dataset, self.row_groups, tokenizer, packing=packing, **self.prepare_options
            )
            self._check_tags(self.data_report)
            check_vocabulary(train_dataset, tokenizer, model)
            self.row_groups.check(self.data_report.rows)
        kwargs["data_collator"] = self._make_collator(
            kwargs.get("data_collator"), args, model, tokenizer, train_dataset
        )
        super().__init__(model, args, train_dataset=train_dataset, processing_class=tokenizer, **kwargs)
        self.eval_dataset = self._prepare_for_evaluation(self.eval_dataset)
        check_world(self.accelerator)
        self._warn_of_cuts("training rows", self.data_report)
        self._check_gradient_access()

        # Reference and loss.
        chosen, self.reference_choice = reference_setup.make_reference_for_run(reference, self._reference_context())
        self.defended = DefendedForward(chosen, side)
        if self.is_fsdp_enabled:
            shard_by_layer(self.accelerator, self.defended.layout)
        if self.accelerator.is_main_process:
            log.info("reference: %s", self.reference_choice)
        self._utilisation = utilisation_per_token(model, self.train_dataset, self.accelerator.num_processes)
        count = len(self.defended.layout.layers)
        self._drift_layers = tuple(sorted({round(count * (i + 1) / DRIFT_LAYERS) for i in range(DRIFT_LAYERS)} - {0}))
        if not chosen.same_shape:
            self._drift_layers = ()
        self._terms: tuple[TokenTerm, ...] = tuple(named.term for named in self.row_groups.terms)

        self.apart = ApartGradients(self.row_groups)
        self.observer = DefenseObserver(self, [self.row_groups.logged_names(i) for i in range(len(self.defenses))])
        if choice_suites:  # before the observer, which reads what they note
            self.add_callback(ChoiceScores(self, choice_suites, choices_every, Encoder(tokenizer, template_date)))
        self.add_callback(StepHooks(self))
        self.add_callback(self.observer)

    def _check_gradient_access(self) -> None:
        methods = ("before_optimizer_step", "join_gradients")
        acting = [d.kind for d in self.defenses if any(type(d).overrides(method) for method in methods)]
        if acting and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise UserError(
                f"{', '.join(acting)}: acts on the gradient before the optimizer step, which DeepSpeed does not show "
                "and FSDP shows in parts; train without them"
            )

    def _reference_context(self) -> ReferenceContext:
        args = self.args
        dataset: Any = self.train_dataset
        has_length = hasattr(dataset, "__len__") and len(dataset) > 0
        rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        epochs = args.num_train_epochs
        if has_length and args.max_steps > 0:
            epochs = args.max_steps * rows_per_step / len(dataset)
        return ReferenceContext(
            self.model,
            self.defenses,
            self.processing_class,
            texts(dataset) if has_length else None,
            epochs * self.reference_runs,
            reference_setup.reference_precision(self.accelerator),
        )

    # ---- one optimizer step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The prepared micro-batches of one optimizer step, and int64 [token sets]: its tokens on all processes."""
        batches = [self.prepare_batch(batch) for batch in islice(epoch_iterator, num_batches)]
        # One collective per step: token counts, whether any process was asked to stop, and whether any had a loss that
        # is not finite.
        flags = [torch.tensor([int(self.stop.requested)], device=device), self.monitor.take_broken(device)[None]]
        sums = self.sum_over_ranks(torch.cat([self.count_step_tokens(batches, device), *flags]))
        *counts, stop_requests, broken_losses = sums.tolist()
        self.stop.agreed = stop_requests > 0
        self._check_finite("loss", math.nan if broken_losses else 0.0)
        tokens = dict(zip(self.row_groups.token_sets, counts, strict=True))
        self._empty_token_sets = {token_set for token_set, count in tokens.items() if not count}
        self.monitor.add_tokens(sum(tokens[TokenSet("all", part)] for part in ("learned", *self.row_groups.unlearned)))
        return batches, sums[: len(counts)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of processes (which are averaged)."""
        if "token_masks" not in inputs:  # called by somebody else than the training and evaluation loops
            inputs = self.prepare_batch(inputs)
        if not isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = self._get_num_items_in_batch([inputs], inputs["input_ids"].device)
        step = self.state.global_step + 1
        reads_drift = self._reads_drift_at(step) and model.training
        terms = self._terms
        if reads_drift and not any(term.reads_reference for term in terms):
            terms = (*terms, Divergence("kl", 0.0))
        request = LossRequest(
            inputs["labels"],
            inputs["token_masks"],
            step_tokens=dict(zip(self.row_groups.token_sets, num_items_in_batch, strict=True)),
            scale=float(self.accelerator.num_processes),
            terms=terms,
            penalties=self.row_groups.penalties,
            label_weights=self.row_groups.label_weights,
            weighing=self.row_groups.weighing,
            groups=self.row_groups.groups,
            drift_layers=self._drift_layers if reads_drift else (),
            keys=inputs.get("row_keys"),
        )
        with offload_activations(self.args):
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=attention_mask_of(inputs),
                position_ids=inputs.get("position_ids"),
                defended=request,
            )
        if model.training:
            # A step that holds none of a term's tokens has no reading of it, which is not a reading of 0.
            read_on = {term.name: term.token_set for term in terms} | request.read_on
            unread = {name for name, token_set in read_on.items() if token_set in self._empty_token_sets}
            self.monitor.add({n: v for n, v in outputs["metrics"].items() if n not in unread}, step)
        loss, *own = outputs["losses"]
        if own and model.training:
            self.apart.add(self.model, own)
        else:
            loss = sum(own, loss)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _reads_drift_at(self, step: int) -> bool:
        """At the first and the last step, and every `drift_every`."""
        return bool(self.drift_every) and (step in (1, self.state.max_steps) or step % self.drift_every == 0)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As Trainer.training_step; after a step's last micro-batch, defenses join gradients that are kept apart."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.row_groups.joining and self.accelerator.sync_gradients:
            read = self.apart.join(self.model, self.sum_over_ranks, self.accelerator.num_processes)
            self.monitor.add({name: value / self.accelerator.num_processes for name, value in read.items()},
                             self.state.global_step + 1)  # fmt: skip
        return loss

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"step {self.state.global_step}: {name} is {value}; training stopped. Lower the learning rate or the "
                "defenses' strengths, or look at the rows of this step"
            )

    # ---- training, logs, saving ----

    @property
    def stopped_early(self) -> str | None:
        """Why a defense ended the training; None if none did."""
        return self.observer.reason

    @property
    def interrupted(self) -> bool:
        """Whether a request to stop ended the training before its last step."""
        return self.stop.agreed and self.stopped_early is None and self.state.global_step < self.state.max_steps

    def _prepare_for_training(self, *args: Any) -> Any:
        prepared = super()._prepare_for_training(*args)
        reference_setup.prepare_reference(self.defended.reference, self)
        return prepared

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train, with every defense attached to the model meanwhile."""
        if self.evaluated_first:
            raise UserError("DeepSpeed has prepared the model without an optimizer: train first, then evaluate")
        # The monitor's clock starts here.
        self.monitor = Monitor(self._utilisation, self.defended.reference.watch, by_step=bool(self.observer.observing))
        with contextlib.ExitStack() as stack:
            if self.defended.side is not None:
                stack.enter_context(self.defended.side.active())
            for defense in self.defenses:
                stack.enter_context(defense.attach(self.model))
            result = super().train(*args, **kwargs)
        broken = self.sum_over_ranks(self.monitor.take_broken(self.accelerator.device))
        self._check_finite("loss", math.nan if broken else 0.0)
        self.observer.restore_snapshot()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the monitor's metrics. Raises UserError if loss or gradient is not a finite number."""
        if "loss" in logs:
            logs.update(self.monitor.flush(self.accelerator))
            for name in ("loss", "grad_norm"):
                self._check_finite(name, logs.get(name, 0.0))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter as a PEFT folder, after every defense's `after_training`. A collective."""
        config = self.model.get_base_model().config
        # transformers does not keep the revision that it loaded; PEFT's config has a place for it.
        revision = self.model.active_peft_config.revision
        context = FinishContext(config._name_or_path, revision, seed=self.args.seed, notify=print)

        def finish(saved: Path) -> None:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(str(saved))
            for defense in self.defenses:
                defense.after_training(saved, context)

        folder = Path(output_dir or str(self.args.output_dir))
        save_adapter(self.model, folder, main=self.accelerator.is_main_process, finish=finish, stale=adapter_files())
        self.accelerator.wait_for_everyone()
