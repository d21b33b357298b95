"""TrainingArguments: made from a recipe, and checked for what DefendedTrainer would silently get wrong."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import logging
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import save_on_cpu
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.models.load import pick_dtype
from ema_scale.training.data import is_prepared
from ema_scale.training.distributed import device_arguments, timeout_seconds, zero_stage

if TYPE_CHECKING:
    from ema_scale.recipe import Recipe

# Arguments of TrainingArguments, TRL's SFTConfig and Trainer: the values that work (None and False always do), and why
# no other does.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0,), "the fused loss has no label smoothing"),
    "loss_type": (("nll", "chunked_nll"), "the loss is the cross-entropy and the defenses' terms"),
    "router_aux_loss_coef": ((0,), "the loss has no term for a router's balance"),
    "compute_loss_func": ((), "the loss is the cross-entropy and the defenses' terms; write a Defense for another"),
    "compute_metrics": ((), "logits are never formed; evaluate the saved adapter"),
    "preprocess_logits_for_metrics": ((), "logits are never formed; evaluate the saved adapter"),
    "model_init": ((), "give a model"),
    "neftune_noise_alpha": ((0,), "its noise would differ between policy and reference"),
    "use_liger_kernel": ((), "it would replace the defended forward; the loss is fused already"),
    "torch_compile": (
        (),
        "the reference switches adapters inside the forward, which compiled code ignores",
    ),
    "fp16": ((), "the loss forms gradients in the forward, before they can be scaled, so they vanish; use bf16"),
    "fp16_full_eval": ((), "use bf16"),
    "auto_find_batch_size": ((), "rows per step would change unnoticed; set per_device_train_batch_size"),
    "push_to_hub": ((), "checkpoints are not pushed; call save_model and upload its folder"),
    "model_init_kwargs": (({},), "give a loaded model"),
    "truncation_mode": (("keep_start",), "rows are cut at their end"),
    "padding_free": ((), "use packing, which has no padding between rows either"),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "a step's rows would then depend on their lengths, and a defense's share with them; the batches of a step hold "
        "rows of similar length in any case, so leave it random",
    ),
    "enable_jit_checkpoint": ((), "each process would save by itself; `ema train` saves a checkpoint on a signal"),
}

# SFTConfig's arguments on how rows become tokens. A dataset that SFTTrainer has prepared is tokenized already, so that
# any value is accepted for it.
_REFUSED_FOR_ROWS: dict[str, tuple[tuple[Any, ...], str]] = {
    "chat_template_path": ((), "set tokenizer.chat_template and pass it as processing_class"),
    "eos_token": ((), "set tokenizer.eos_token and pass it as processing_class"),
    "packing_strategy": (("bfd",), "packing cuts no row and always fits best"),
    "eval_packing": ((), "evaluation rows are not packed"),
    "shuffle_dataset": ((), "each epoch is shuffled; for a fixed order, shuffle the rows yourself"),
}


log = logging.getLogger(__name__)


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments with what a recipe has besides."""

    activation_offloading: bool = field(default=False, metadata={"help": "as in TRL's SFTConfig"})


# Those whose package has another name than transformers gives them.
_PACKAGES = {"azure_ml": "azureml.core"}
_EXTRAS = ("mlflow", "trackio", "wandb")


def _check_logger(name: str) -> None:
    """Raises UserError for a logger that transformers does not know, or whose package is not installed."""
    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise UserError(f"training.report_to: found {name!r}, expected some of {known}, or none")
    package = _PACKAGES.get(name, name)
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        what = f"'ema-scale[{name}]'" if name in _EXTRAS else package
        raise UserError(f"training.report_to: {name} is not installed; run: pip install {what}")


def training_arguments(recipe: Recipe, run_dir: RunDir) -> RecipeArguments:
    """transformers' TrainingArguments of a recipe. Raises UserError for values that it refuses."""
    t = recipe.training
    if t.group_by_length:
        raise UserError(
            "training.group_by_length: found true, expected false: a step's rows would depend on their lengths, and a "
            "defense's share with them; remove the key (the batches of a step hold rows of similar length in any case)"
        )
    if ("8bit" in t.optim or "bnb" in t.optim) and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"training.optim: {t.optim!r} needs the bitsandbytes package, which is not installed")
    for name in t.report_to:
        _check_logger(name)
    if 0 < t.max_steps <= t.warmup_steps:
        log.warning(
            "training.warmup_steps: %d of %d steps: the learning rate does not reach %g; lower it, or raise max_steps",
            t.warmup_steps, t.max_steps, t.learning_rate,
        )  # fmt: skip
    if t.optim not in (known := [one.value for one in OptimizerNames]):
        near = difflib.get_close_matches(t.optim, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "expected a name of transformers, such as adamw_torch"
        raise UserError(f"training.optim: found {t.optim!r}; {hint}")
    zero_stage(t.deepspeed)  # a file that is no config ends here, before DeepSpeed reads it
    try:
        arguments = RecipeArguments(
            output_dir=str(run_dir.checkpoints),
            seed=recipe.seed,
            num_train_epochs=t.num_train_epochs,
            max_steps=t.max_steps,
            learning_rate=t.learning_rate,
            warmup_steps=t.warmup_steps,
            lr_scheduler_type=t.lr_scheduler_type,
            weight_decay=t.weight_decay,
            optim=t.optim,
            per_device_train_batch_size=t.per_device_train_batch_size,
            gradient_accumulation_steps=t.gradient_accumulation_steps,
            max_grad_norm=t.max_grad_norm,
            gradient_checkpointing=t.gradient_checkpointing,
            activation_offloading=t.activation_offload,
            logging_steps=t.logging_steps,
            logging_first_step=True,
            save_steps=t.save_steps,
            save_total_limit=t.save_total_limit,
            report_to=t.report_to or "none",
            bf16=torch.cuda.is_available() and pick_dtype(recipe.model.dtype) == torch.bfloat16,
            disable_tqdm=not sys.stderr.isatty(),
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            ddp_timeout=timeout_seconds(),
            log_level="warning",
            **device_arguments(),
        )
        Trainer.get_optimizer_cls_and_kwargs(arguments)  # which says what else the optimizer needs
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {error}") from None
    return arguments


def check_arguments(args: TrainingArguments | None, **keywords: Any) -> TrainingArguments:
    """A copy of the arguments with the settings that DefendedTrainer needs.

    keywords: DefendedTrainer's and Trainer's own, which are only checked.

    Raises UserError for what would be ignored or train wrongly.
    """
    args = TrainingArguments(output_dir="tmp_trainer") if args is None else copy.copy(args)
    refused = _REFUSED
    if not all(map(is_prepared, _datasets(keywords.get("train_dataset"), keywords.get("eval_dataset")))):
        refused = _REFUSED | _REFUSED_FOR_ROWS
        if getattr(args, "completion_only_loss", None) is False:
            raise UserError(
                "completion_only_loss: found False, which DefendedTrainer does not support: it learns the assistant's "
                "turns of raw rows; leave it out, or give a tokenized dataset with labels"
            )
    for name, (supported, why) in refused.items():
        value = keywords.get(name, getattr(args, name, None))
        if value is not None and value is not False and value not in supported:
            shown = getattr(value, "__name__", repr(value))
            raise UserError(f"{name}: found {shown}, which DefendedTrainer does not support: {why}")
    if args.average_tokens_across_devices is False and args.world_size > 1:
        raise UserError(
            "average_tokens_across_devices: found False, expected True: tokens are counted over the whole step"
        )
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(args.parallelism_config, name, 1) > 1:
            raise UserError(
                f"parallelism_config: {name} splits rows or layers, which the loss cannot handle; leave it 1"
            )
    if args.n_gpu > 1:
        raise UserError(f"one process sees {args.n_gpu} GPUs; start one process per GPU with `accelerate launch`")
    if args.gradient_checkpointing:
        settings = dict(args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
        if settings.get("use_reentrant"):
            raise UserError("gradient_checkpointing_kwargs: use_reentrant gives penalties no gradient; set it false")
        args.gradient_checkpointing_kwargs = {**settings, "use_reentrant": False}
    check_offload(args)
    args.remove_unused_columns = False  # the collator drops what the model does not read
    args.logging_nan_inf_filter = False  # it would report an average in place of a NaN
    args.prediction_loss_only = True
    return args


def _datasets(train: Any, evaluation: Any) -> list[Any]:
    evaluated = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    return [rows for rows in (train, *evaluated) if rows is not None]


def offload_activations(args: Any) -> contextlib.AbstractContextManager[Any]:
    """With `args.activation_offloading`, what forward saves for backward goes to the CPU, pinned if there is a GPU.

    With checkpointing that is the input of each layer, and the gradient that the fused loss forms. The reference saves
    nothing in any case.
    """
    if not getattr(args, "activation_offloading", False):
        return contextlib.nullcontext()
    return save_on_cpu(pin_memory=torch.cuda.is_available())


def check_offload(args: Any) -> None:
    """Raises UserError for offload without checkpointing: autograd would save, and move, every weight as well."""
    if getattr(args, "activation_offloading", False) and not args.gradient_checkpointing:
        raise UserError(
            "activation offload needs gradient_checkpointing: true; without it all weights would be moved as well"
        )
