"""TrainingArguments as DefendedTrainer can honour them: what it would silently get wrong is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from transformers import TrainingArguments

from ema_scale.core.errors import UserError
from ema_scale.training.data import is_prepared

# Of TrainingArguments, TRL's SFTConfig and Trainer's own keywords: the values that are honoured, None and False always,
# and why no other.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0,), "the fused loss has no label smoothing"),
    "loss_type": (("nll", "chunked_nll"), "the loss is the cross-entropy and the defenses' terms"),
    "router_aux_loss_coef": ((0,), "the loss has no term for a router's balance"),
    "compute_loss_func": ((), "the loss is the cross-entropy and the defenses' terms; write a Defense for another"),
    "compute_metrics": ((), "logits are never formed; evaluate the saved adapter"),
    "preprocess_logits_for_metrics": ((), "logits are never formed; evaluate the saved adapter"),
    "model_init": ((), "give a model"),
    "neftune_noise_alpha": ((0,), "its noise would not be the same for policy and reference"),
    "use_liger_kernel": ((), "it would take the defended forward away; the loss is fused already"),
    "torch_compile": ((), "the reference switches adapters inside the forward, which a compiled one does not see"),
    "fp16": ((), "the loss forms gradients in the forward, before they could be scaled, and they vanish; use bf16"),
    "fp16_full_eval": ((), "use bf16"),
    "auto_find_batch_size": ((), "rows a step would change unseen; set per_device_train_batch_size"),
    "push_to_hub": ((), "checkpoints are not pushed; call save_model and upload its folder"),
    "model_init_kwargs": (({},), "give a loaded model"),
    "truncation_mode": (("keep_start",), "rows are cut at their end"),
    "padding_free": ((), "use packing, which puts no padding between rows either"),
    "enable_jit_checkpoint": ((), "each process would save by itself; `ema train` checkpoints on a signal"),
}


# Of SFTConfig: how rows become tokens, which is settled for a dataset that SFTTrainer has prepared, whose arguments
# these may be.
_REFUSED_OF_ROWS: dict[str, tuple[tuple[Any, ...], str]] = {
    "chat_template_path": ((), "set tokenizer.chat_template and pass it as processing_class"),
    "eos_token": ((), "set tokenizer.eos_token and pass it as processing_class"),
    "packing_strategy": (("bfd",), "packing cuts no row, and puts each where it fits best"),
    "eval_packing": ((), "rows to evaluate are not packed"),
    "shuffle_dataset": ((), "each epoch is shuffled; for a fixed order, shuffle the rows yourself"),
}


def check_arguments(args: TrainingArguments | None, **keywords: Any) -> TrainingArguments:
    """The arguments, made to fit. keywords: DefendedTrainer's and Trainer's own, which are only looked at.

    Raises UserError for what would be ignored or train wrongly.
    """
    args = args or TrainingArguments(output_dir="tmp_trainer")
    refused = _REFUSED
    if not all(map(is_prepared, _all_of(keywords.get("train_dataset"), keywords.get("eval_dataset")))):
        refused = _REFUSED | _REFUSED_OF_ROWS
        if getattr(args, "completion_only_loss", None) is False:
            raise UserError(
                "completion_only_loss: found False, which DefendedTrainer does not support: raw rows are learned on "
                "what the assistant says; leave it out, or give a tokenized dataset with labels"
            )
    for name, (honoured, why) in refused.items():
        found = keywords.get(name, getattr(args, name, None))
        if found is not None and found is not False and found not in honoured:
            shown = getattr(found, "__name__", repr(found))
            raise UserError(f"{name}: found {shown}, which DefendedTrainer does not support: {why}")
    if args.average_tokens_across_devices is False and args.world_size > 1:
        raise UserError(
            "average_tokens_across_devices: found False, expected True: tokens are counted over all of a step"
        )
    split = [f"{n}_size" for n in ("tp", "cp", "sp") if getattr(args.parallelism_config, f"{n}_size", 1) > 1]
    if split:
        raise UserError(
            f"parallelism_config: {split[0]} splits rows or layers, which the loss does not know; leave it 1"
        )
    if args.n_gpu > 1:
        raise UserError(f"one process sees {args.n_gpu} GPUs; start one process a GPU with `accelerate launch`")
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


def _all_of(train: Any, evaluated: Any) -> list[Any]:
    named = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    return [rows for rows in (train, *named) if rows is not None]


def offload_activations(args: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside, what forward saves for backward goes to the CPU, pinned where there is a GPU, if
    `args.activation_offloading` (TRL's name) says so. With checkpointing that is each layer's input, and the gradient
    that the fused loss forms; the reference saves nothing either way.
    """
    if not getattr(args, "activation_offloading", False):
        return contextlib.nullcontext()
    return save_on_cpu(pin_memory=torch.cuda.is_available())


def check_offload(args: Any) -> None:
    """Raises UserError for offload without checkpointing: autograd would save, and move, every weight as well."""
    if getattr(args, "activation_offloading", False) and not args.gradient_checkpointing:
        raise UserError(
            "activation offload needs gradient_checkpointing: true; without it all weights would be moved too"
        )
