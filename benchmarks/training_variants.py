"""Variants of a training step with KL + LDIFS, and of plain fine-tuning: the field's, and ours per kind of reference.

All go through transformers' training loop with the same rows, the same random weights and the same LoRA adapter, and
give the same loss, which is checked before times count. Plain fine-tuning is also that of TRL's SFTTrainer. The
field's two ways of a defense compute full logits of policy and reference in float32 and the divergence from them, as
TRL's trainers with a reference model and the code released with arXiv 2508.06249 do; their hidden states are taken by
hooks, which costs less than asking the model for all of them.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.phases import Phases
from benchmarks.priced import marked, priced
from benchmarks.random_model import fields_of, placeholder_tokenizer, random_base, random_rows
from ema_scale.config.sections import AdapterRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.data.collate import ChatCollator
from ema_scale.defenses import KL, LDIFS
from ema_scale.models.hooks import capture
from ema_scale.models.layout import ModelLayout
from ema_scale.models.load import load_base
from ema_scale.models.lora import lora_config
from ema_scale.models.sharding import shard_frozen
from ema_scale.training.dataloading import EpochSampler
from ema_scale.training.distributed import FSDPMixin, device_arguments, launched_processes, shard_by_layer
from ema_scale.training.trainer import DefendedTrainer

PLAIN_LOGITS, SECOND, FORWARDS = "plain, transformers' loss", "second model, full logits", "two forwards, full logits"
PLAIN, SEPARATE = "plain", "separate: a second model, fused"
OFF, TWO, CACHED = "adapter_off: two forwards, fused", "two_stream", "cached"
DRIFT = "plain, with a reading of drift at every step"
SFT = "plain, TRL's SFTTrainer"
VARIANTS = (SFT, PLAIN_LOGITS, PLAIN, DRIFT, SECOND, FORWARDS, SEPARATE, OFF, TWO, CACHED)
UNDEFENDED = (SFT, PLAIN_LOGITS, PLAIN, DRIFT)
WITH = "with "  # a variant of this beginning has the defense behind it and no other, on adapter_off
_OURS = {PLAIN: "auto", DRIFT: "auto", OFF: "adapter_off", TWO: "two_stream", CACHED: "cached"}
WARMUP = 2


@dataclass(frozen=True)
class Task:
    """What every variant trains.

    Args:
        model: a key of `random_model.SHAPES`.
        layers: use only the first so many.
        rows: rows per step and process.
        length: tokens per row.
        steps: timed steps.
        dtype: of the weights.
        device: cpu or cuda.
        checkpointing: recompute activations in the backward pass.
        kl, ldifs: strengths; 0 leaves the defense out.
        deepspeed: a DeepSpeed config.
        fsdp: shard by FSDP2.
        saved: a folder with the model, for ZeRO-3 to shard while loading; None: build it.
    """

    model: str = "small"
    layers: int | None = None
    rows: int = 2
    length: int = 128
    steps: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    checkpointing: bool = True
    kl: float = 0.1
    ldifs: float = 0.1
    deepspeed: str | None = None
    fsdp: bool = False
    saved: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        return fields_of(self.model, self.layers)

    @property
    def defenses(self) -> list[Any]:
        return [*[KL(strength=self.kl)] * bool(self.kl), *[LDIFS(strength=self.ldifs, count=5)] * bool(self.ldifs)]

    def base(self) -> Any:
        if self.saved is None:
            return random_base(self.fields, self.dtype, self.device)
        return load_base(ModelRecipe(path=self.saved, dtype=self.dtype)).eval()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def shown(self) -> dict[str, Any]:
        """The options to show above the table."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "saved" and (k, v) != ("fsdp", False)}


def chosen(names: Sequence[str] | None, variants: tuple[str, ...]) -> tuple[str, ...]:
    """PLAIN and those of `variants` that begin with one of `names`; None: all. Raises UserError for a name of none."""
    for name in names or ():
        if not any(variant.startswith(name) for variant in variants):
            raise UserError(f"--variant: found {name!r}, expected the first words of one of: {'; '.join(variants)}")
    return tuple(w for w in variants if not names or w == PLAIN or any(w.startswith(n) and n != PLAIN for n in names))


@dataclass
class Trained:
    """What a training run measured.

    Args:
        seconds: elapsed, per timed step.
        cpu: processor seconds, per timed step.
        losses: one per step, warm-up included.
        reference: the share of time that the reference's hidden states take, if known.
        phases: `Phases`' seconds, per timed step; our own variants only.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reference: float | None = None
    phases: list[dict[str, float]] = field(default_factory=list)


def train(
    variant: str, task: Task, began: Callable[[], Any] = lambda: None, ended: Callable[[], Any] = lambda: None
) -> Trained:
    """Train one variant for `WARMUP` + `task.steps` steps. `cached` first fills its cache, in EMA_CACHE.

    Args:
        variant: one of VARIANTS, or WITH and a defense as `priced` takes it.
        task: what to train.
        began: called before the first step, when everything is loaded.
        ended: called after each step.
    """
    from peft import get_peft_model

    base = task.base()
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config(base, AdapterRecipe(dropout=0.0)))
    _stir(model)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ema-bench-"))
        trainer = _trainer(variant, task, model, folder, stack)
        clock = _Clock(began, ended, task.device)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        phases = Phases(trainer, task.device) if isinstance(trainer, DefendedTrainer) else None
        with phases.installed() if phases else contextlib.nullcontext():
            trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
    shares = [row["reference_share"] for row in rows[WARMUP:] if "reference_share" in row]
    seconds, used = (
        [b - a for a, b in zip(times, times[1:], strict=False)][WARMUP - 1 :] for times in (clock.ends, clock.used)
    )
    losses = [row["loss"] for row in rows]
    share = sum(shares) / len(shares) if shares else None
    return Trained(seconds, used, losses, share, phases.of(seconds) if phases else [])


class SameOrder:
    """A trainer that takes the rows in the order in which `DefendedTrainer` does."""

    args: Any
    accelerator: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows_per_step = self.args.per_device_train_batch_size * self.accelerator.num_processes
        rows = len(train_dataset or self.train_dataset)
        return EpochSampler(rows, seed=self.args.seed, epoch=lambda: 0, rows_per_step=rows_per_step)


def _trainer(variant: str, task: Task, model: Any, folder: str, stack: contextlib.ExitStack) -> Trainer:
    steps = WARMUP + task.steps
    count = steps * task.rows * launched_processes()
    rows, tokenizer = random_rows(task.fields, count, task.length), placeholder_tokenizer()
    options: dict[str, Any] = dict(
        output_dir=folder,
        per_device_train_batch_size=task.rows,
        max_steps=steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        gradient_checkpointing=task.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if task.checkpointing else None,
        bf16=task.device == "cuda" and task.dtype == "bfloat16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        **(device_arguments() if task.device == "cpu" else {}),
    )
    if variant == SFT:
        return _sft_trainer(options, model, rows, tokenizer)
    args = TrainingArguments(**options)
    if variant.startswith(WITH):
        defense = priced(variant.removeprefix(WITH), task.fields, Path(folder))
        rows = stack.enter_context(marked(defense, rows))
        return DefendedTrainer(model, args, rows, [defense], "adapter_off", tokenizer, drift_every=0)
    if variant in _OURS or variant == SEPARATE:
        defenses = [] if variant in UNDEFENDED else task.defenses
        reference, drift_every = _OURS.get(variant, "adapter_off"), int(variant == DRIFT)
        trainer = DefendedTrainer(model, args, rows, defenses, reference, tokenizer, drift_every=drift_every)
        if variant == SEPARATE:
            _separate(trainer, task)
        return trainer
    collate = ChatCollator(tokenizer)
    return FullLogits(variant, task, model=model, args=args, train_dataset=rows, data_collator=collate)


def _sft_trainer(options: dict[str, Any], model: Any, rows: Any, tokenizer: Any) -> Trainer:
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise UserError(f"{SFT}: TRL is not installed; pip install 'ema-scale[trl]', or choose by --variant") from None
    collate = ChatCollator(tokenizer)

    class InOrder(SameOrder, SFTTrainer):
        pass

    def collated(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: value for name, value in collate(batch).items() if name != "tags"}

    args = SFTConfig(**options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return InOrder(model, args, collated, rows, processing_class=tokenizer)


def _separate(trainer: DefendedTrainer, task: Task) -> None:
    # As `reference: {kind: separate}` does, with a model that is in no folder.
    from ema_scale.reference.separate import Separate
    from ema_scale.training.forward import DefendedForward

    trainer.defended.remove()
    other = task.base()
    trainer.defended = DefendedForward(Separate(trainer.defended.layout, other))


class FullLogits(SameOrder, FSDPMixin, Trainer):
    """Plain fine-tuning by transformers' own loss, or with a reference's full logits beside the policy's."""

    def __init__(self, variant: str, task: Task, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.variant, self.task = variant, task
        self.parts = ModelLayout.of(kwargs["model"])
        if self.is_fsdp_enabled:
            shard_by_layer(self.accelerator, self.parts)
        self.other: Any = None
        if variant == SECOND:
            self.other = task.base()
            self.other_parts = ModelLayout.of(self.other, adapters=False)

    def _prepare_for_training(self, *args: Any) -> Any:
        prepared = super()._prepare_for_training(*args)
        if self.other is not None and self.is_deepspeed_enabled:  # as TRL's prepare_deepspeed
            import deepspeed

            config = copy.deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
            config = {k: v for k, v in config.items() if k not in ("optimizer", "scheduler")}
            if config["zero_optimization"]["stage"] != 3:
                config["zero_optimization"] = {"stage": 0}  # the lower stages shard what only training has
            self.other, *_ = deepspeed.initialize(model=self.other, config=config)
            self.other.eval()
        elif self.other is not None and self.is_fsdp_enabled:
            shard_frozen(self.other, self.other_parts.layers)
        return prepared

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self.variant == PLAIN_LOGITS:
            return model(**asked, labels=inputs["labels"]).loss
        layers = [k for d in self.task.defenses for k in d.penalty_layers(len(self.parts.layers))]
        theirs: dict[int, Tensor] = {}
        ours: dict[int, Tensor] = {}
        with torch.no_grad():
            if self.other is None:
                peft = self.accelerator.unwrap_model(model)
                with capture(self.parts.layers, layers, theirs.__setitem__), peft.disable_adapter():
                    reference = model(**asked).logits
            else:
                with capture(self.other_parts.layers, layers, theirs.__setitem__):
                    reference = self.other(**asked).logits
        with capture(self.parts.layers, layers, ours.__setitem__):
            logits = model(**asked).logits
        log_p, log_q = F.log_softmax(logits.float(), -1), F.log_softmax(reference.float(), -1)
        loss = F.nll_loss(log_p[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        if self.task.kl:
            loss = loss + self.task.kl * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        for k in layers:
            apart = F.normalize(ours[k].float(), dim=-1) - F.normalize(theirs[k].float(), dim=-1)
            loss = loss + self.task.ldifs * apart.square().sum(-1).mean()
        return loss


def _stir(model: Any) -> None:
    """Give LoRA's B random values, so that policy and reference differ from the first step on."""
    made = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            whole = getattr(parameter, "ds_shape", parameter.shape)
            values = 0.01 * torch.randn(whole, generator=made)
            if hasattr(parameter, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if torch.distributed.get_rank() == 0:
                        parameter.data.copy_(values)
            else:
                parameter.data.copy_(values)


class _Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self, began: Callable[[], Any], ended: Callable[[], Any], device: str) -> None:
        self.began, self.ended, self.device = began, ended, device
        self.ends: list[float] = []
        self.used: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.began()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.used.append(time.process_time())
        self.ended()


def measure(variant: str, task: dict[str, Any], cache: str) -> dict[str, Any]:
    """peak_bytes of training one variant, with weights, adapter and optimizer; it has this process to itself."""
    import os

    from benchmarks.harness import peak_rss, reset_peak_rss

    os.environ["EMA_CACHE"] = str(Path(cache))
    asked = Task(**task)
    if asked.device == "cuda":
        train(variant, asked, torch.cuda.reset_peak_memory_stats)
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    reset_peak_rss()
    before = peak_rss()
    train(variant, asked, reset_peak_rss)
    return {"peak_bytes": peak_rss() - before}
