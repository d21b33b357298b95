"""DefendedTrainer: transformers' Trainer with defenses.

    trainer = DefendedTrainer(model, args, rows, defenses=[KL(0.1), Interleaving("safe.jsonl", 0.05)])
    trainer.train()
    trainer.save_model("adapter")

Cross-entropy is the mean over assistant tokens, every divergence the mean over the tokens of its own scope,
both over the whole optimizer step: all accumulated micro-batches on all processes. Splitting a step
differently changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date as Date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ema_scale.core.errors import UserError
from ema_scale.data.packing import texts
from ema_scale.data.tokens import load_tokenizer
from ema_scale.defenses.base import Defense, Divergence, FinishContext, token_set_name
from ema_scale.defenses.registry import parse
from ema_scale.defenses.row_groups import OWN_GROUPS, RowGroups, unique
from ema_scale.models.lora import save_adapter, with_adapter
from ema_scale.reference.cached import Cached, SequenceKeys
from ema_scale.training import reference_setup
from ema_scale.training.arguments import check_arguments, offload_activations
from ema_scale.training.callbacks import DefenseObserver, StepHooks
from ema_scale.training.checkpointing import CheckpointMixin
from ema_scale.training.data import DataReport, check_vocabulary, prepare_data
from ema_scale.training.dataloading import DataMixin
from ema_scale.training.distributed import FSDPMixin, check_world, shard_by_layer
from ema_scale.training.forward import DefendedForward, LossRequest
from ema_scale.training.metrics import Monitor, utilisation_per_token
from ema_scale.training.reference_setup import ReferenceContext, ReferenceSpec
from ema_scale.training.token_masks import attention_of, count_tokens, padding_last

log = logging.getLogger(__name__)


DRIFT_LAYERS = 8


class DefendedTrainer(DataMixin, CheckpointMixin, FSDPMixin, Trainer):
    """A Trainer for a LoRA adapter under any number of defenses.

    model: a PeftModel, or a causal LM, its folder or its hub id (loaded as `load_base` does, in bfloat16 where the GPU
    has it), which gets `peft_config` (default: the paper's LoRA). train_dataset: see
    `data.prepare`; an eval_dataset is prepared like it, without packing and without rows or prompts of defenses.
    reference: auto, adapter_off, two_stream, cached, or {"kind": "separate", "model": ...};
    `reference_choice` is then what is used, and why; `stopped_early` is why a defense ended the training.
    processing_class: the tokenizer; default: the one beside the model. max_length, packing: rows are cut to so many
    tokens, and put behind one another into sequences of up to so many, which a batch size then counts; default: those
    of `args` if it is TRL's SFTConfig, else 2048 and no packing. drift_every: steps between readings of the distance to
    the reference (0: none); a reading runs the reference, also where no defense does. reference_runs: how many
    trainings read these rows' reference, this one included, and can share a cache of it. token_cache: a folder in which
    trainings find what others have tokenized. template_date: what a chat template that writes dates is told; default:
    today. Everything else is transformers.Trainer's.

    Raises UserError for what cannot be trained rightly: see `Anatomy.of`, `data.prepare`, `check_world` and
    `arguments`.
    """

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
        drift_every: int = 10,
        reference_runs: int = 1,
        on_bad: str = "raise",
        token_cache: Path | None = None,
        template_date: Date | None = None,
        **kwargs: Any,
    ) -> None:
        args = check_arguments(args, train_dataset=train_dataset, **kwargs)
        self.defenses = parse(list(defenses))
        self.parts = RowGroups.of(self.defenses)
        trusted = getattr(args, "trust_remote_code", False)  # of TRL's SFTConfig, for what is loaded here
        model = with_adapter(
            model, peft_config, seed=args.seed, trained=train_dataset is not None, trust_remote_code=trusted
        )
        path = model.get_base_model().config._name_or_path
        tokenizer = processing_class or load_tokenizer(path, trust_remote_code=trusted)
        self.data_report = DataReport()
        self._preparing: dict[str, Any] = {
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
                train_dataset, self.defenses, tokenizer, packing=packing, **self._preparing
            )
            self._check_tags(self.data_report)
            check_vocabulary(train_dataset, tokenizer, model)
            self.parts.check(self.data_report.rows)
        self.drift_every = drift_every
        self.reference_runs = reference_runs
        self.monitor = Monitor()
        self._utilisation: float | None = None
        # What this process was asked for, at any moment, and what all have agreed on, between steps alone.
        self.stop_wished = False
        self.stop_agreed = False
        self._absent: set[str] = set()  # what the step holds no tokens of
        kwargs["data_collator"] = self._collator(kwargs.get("data_collator"), args, model, tokenizer, train_dataset)
        super().__init__(model, args, train_dataset=train_dataset, processing_class=tokenizer, **kwargs)
        self.eval_dataset = self._prepared_for_evaluation(self.eval_dataset)
        check_world(self.accelerator)
        acting = [d.kind for d in self.defenses if type(d).overrides("step")]
        if acting and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise UserError(
                f"{', '.join(acting)}: acts on the gradient before the optimizer step, which DeepSpeed does not show "
                "and FSDP shows in parts; train without them"
            )
        made, self.reference_choice = reference_setup.make_reference_for_run(reference, self._setting())
        self.on_reference_changed: Callable[[], None] = lambda: None
        self.defended = DefendedForward(made)
        if self.is_fsdp_enabled:
            shard_by_layer(self.accelerator, self.defended.anatomy)
        if self.accelerator.is_main_process:
            log.info("reference: %s", self.reference_choice)
        self._utilisation = utilisation_per_token(model, self.train_dataset, self.accelerator.num_processes)
        count = len(self.defended.anatomy.layers)
        self._drift_layers = tuple(sorted({round(count * (i + 1) / DRIFT_LAYERS) for i in range(DRIFT_LAYERS)} - {0}))
        if not made.same_shape:
            self._drift_layers = ()
        terms = self.parts.terms
        self._divergences = tuple(term.divergence for term in terms)
        self._penalties = tuple(
            (unique(d.kind, [e.kind for e in self.defenses[:i]]), i)
            for i, d in enumerate(self.defenses)
            if type(d).overrides("penalty")
        )
        names = [{t.own: t.divergence.name for t in terms if t.owner == i} for i in range(len(self.defenses))]
        for name, i in self._penalties:
            names[i][self.defenses[i].kind] = name
        self.watch = DefenseObserver(self, names)
        self.add_callback(StepHooks(self))
        self.add_callback(self.watch)

    @property
    def stopped_early(self) -> str | None:
        return self.watch.reason

    def _setting(self) -> ReferenceContext:
        args = self.args
        rows: Any = self.train_dataset
        known = hasattr(rows, "__len__") and len(rows) > 0
        rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        seen = args.max_steps * rows_per_step / len(rows) if known and args.max_steps > 0 else args.num_train_epochs
        return ReferenceContext(
            self.model,
            self.defenses,
            self.processing_class,
            texts(rows) if known else None,
            seen * self.reference_runs,
            reference_setup.reference_precision(self.accelerator),
        )

    def _prepare_for_training(self, *args: Any) -> Any:
        prepared = super()._prepare_for_training(*args)
        reference_setup.prepare_reference(self.defended.reference, self)
        return prepared

    # ---- the loss ----

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """int64 [scopes]: tokens of the whole optimizer step on all processes.

        transformers counts one thing, the labels; a divergence may cover others.
        """
        for batch in batch_samples:
            self._check_batch(batch)
        # A wish to stop rides along, and whether the loss of the step before was finite: all processes stop at the same
        # step, for saving is a collective.
        stopping = torch.tensor([int(self.stop_wished)])
        counts = torch.cat([count_tokens(batch_samples, self.parts.tags), stopping]).to(device)
        counts = torch.cat([counts, self.monitor.take_broken(device)[None]])
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        *known, stop, broken = counts.tolist()
        self.stop_agreed = bool(stop)
        self._absent = {c for c, tokens in zip(self.parts.covers, known, strict=True) if not tokens}
        if self.is_in_train and isinstance(self.defended.reference, Cached):
            # Here, where the counts are waited for anyway, and not once more in each forward.
            for batch in batch_samples:
                batch["texts"] = SequenceKeys.of(padding_last(batch))
        if self.is_in_train:
            self._check_finite("loss", math.nan if broken else 0.0)
            read = [
                token_set_name("all", part)
                for part in ("learned", *(t for t in self.parts.tags if t.startswith(OWN_GROUPS)))
            ]
            self.monitor.add_tokens(sum(known[self.parts.covers.index(name)] for name in read))
        return counts[:-2]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of processes (which are averaged)."""
        device = inputs["input_ids"].device
        inputs = padding_last(inputs)
        if not isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = self._get_num_items_in_batch([inputs], device)
        step = self.state.global_step + 1
        reading = bool(self.drift_every) and (step == 1 or step % self.drift_every == 0) and model.training
        divergences = self._divergences
        if reading and not divergences:
            divergences = (Divergence("kl", 0.0),)
        ask = LossRequest(
            inputs["labels"], num_items_in_batch, float(self.accelerator.num_processes), divergences, self._penalties,
            self._drift_layers if reading else (), inputs.get("tags"), inputs.get("template"), self.parts,
            inputs.get("texts"),
        )  # fmt: skip
        with offload_activations(self.args):
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=attention_of(inputs),
                position_ids=inputs.get("position_ids"),
                defended=ask,
            )
        if model.training:
            # Where a step holds none of a term's rows, there is no reading of it, and not one of 0.
            unread = {d.name for d in divergences if d.cover in self._absent}
            self.monitor.add({n: v for n, v in outputs["metrics"].items() if n not in unread}, step)
        return (outputs["loss"], {"loss": outputs["loss"]}) if return_outputs else outputs["loss"]

    # ---- training, logs, saving ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train, with every defense attached to the model while it lasts."""
        if self.evaluated_first:
            raise UserError("DeepSpeed has prepared the model without an optimizer: train first, then evaluate")
        # Its clock starts now.
        self.monitor = Monitor(self._utilisation, self.defended.reference.watch, by_step=bool(self.watch.observing))
        with contextlib.ExitStack() as stack:
            for defense in self.defenses:
                stack.enter_context(defense.attach(self.model))
            result = super().train(*args, **kwargs)
        broken = self.accelerator.reduce(self.monitor.take_broken(self.accelerator.device), "sum")
        self._check_finite("loss", math.nan if broken else 0.0)
        self.watch.go_back()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the monitor's metrics. Raises UserError if loss or gradient is not a finite number."""
        if "loss" in logs:
            logs.update(self.monitor.flush(self.accelerator))
            for name in ("loss", "grad_norm"):
                self._check_finite(name, logs.get(name, 0.0))
        super().log(logs, start_time)

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"step {self.state.global_step}: {name} is {value}; training stopped. Lower the learning rate or the "
                "defenses' strengths, or look at the rows of this step"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter as a PEFT folder, after every defense's `finish`. A collective."""
        config = self.model.get_base_model().config
        # transformers does not keep the revision that it loaded; PEFT's config has a place for it.
        revision = self.model.active_peft_config.revision
        context = FinishContext(config._name_or_path, revision, seed=self.args.seed, notify=print)

        def finish(saved: Path) -> None:
            for defense in self.defenses:
                defense.finish(saved, context)

        folder = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, folder, main=self.accelerator.is_main_process, finish=finish)
        self.accelerator.wait_for_everyone()
