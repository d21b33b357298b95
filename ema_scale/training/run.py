"""The recipe path of training: one recipe, one run folder, resumed where it stopped."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from datetime import date as Date
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_json, atomic_write_text
from ema_scale.core.run_dir import RunDir
from ema_scale.training.distributed import (
    destroy_process_group_at_exit,
    device_arguments,
    is_main,
    launched_processes,
    prepare_environment,
    timeout_seconds,
)
from ema_scale.training.resume_check import (
    check_same_data,
    check_same_training,
    file_marks,
    is_finished,
    renew_recipe,
    weights_of,
)

if TYPE_CHECKING:
    from ema_scale.recipe import Recipe
    from ema_scale.reference.cache_fill import FillStats
    from ema_scale.training.trainer import DefendedTrainer

log = logging.getLogger(__name__)


def train(recipe: Recipe, run_dir: RunDir, resume: bool = True) -> RunDir:
    """Train `recipe` into `run_dir`: adapter/, metrics.jsonl, checkpoints/, data.json, provenance, status.

    Run it again after a stop, a crash or a full disk: it goes on from the newest complete checkpoint and ends
    with the same adapter. A finished run of the same training is recognised and left as it is. resume=False
    starts over. Started by `accelerate launch` or torchrun, every process calls it.

    Raises UserError for bad input, a folder that holds another training, a loss that is not finite and a full
    disk; KeyboardInterrupt after a signal (INT, TERM, USR1), with a checkpoint saved.
    """
    if is_finished(recipe, run_dir) and resume:
        if is_main():
            log.info("%s: finished already", run_dir.path)
            renew_recipe(recipe, run_dir)
        return run_dir
    with run_dir.lock() if is_main() else contextlib.nullcontext():
        if is_main():
            _claim(recipe, run_dir, resume)
        with _reported(run_dir):
            _train(recipe, run_dir, resume)
    return run_dir


def fill_cache(recipe: Recipe) -> FillStats:
    """Compute the cached reference of a recipe's rows ahead of training; every process of a launch its part.

    Raises UserError as `train` does, for ZeRO-3, and if no defense reads the reference; KeyboardInterrupt after a
    signal, with what was computed kept.
    """
    prepare_environment(recipe.training.deepspeed, recipe.training.fsdp)
    from ema_scale.training.reference_setup import prepare_reference

    if not any(d.needs_reference for d in recipe.defenses):
        raise UserError("defenses: none of them reads the reference; there is nothing to cache")
    recipe = recipe.model_copy(update={"reference": "cached"})
    trainer, _ = _trainer(recipe, RunDir(recipe.run_path), [])
    if trainer.is_deepspeed_enabled:
        raise UserError("ema cache runs without DeepSpeed; under ZeRO-3 `ema train` fills the cache when it starts")
    with _stoppable(trainer):
        done = prepare_reference(trainer.defended.reference, trainer)
    assert done is not None
    return done


def _trainer(recipe: Recipe, run_dir: RunDir, callbacks: list[Any]) -> tuple[DefendedTrainer, dict[str, str]]:
    """The trainer of a recipe, and source -> sha256 of its rows."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    from ema_scale.core.collectives import broadcast_from_main
    from ema_scale.core.paths import cache_root
    from ema_scale.core.uri import locate
    from ema_scale.data.rows import load_rows
    from ema_scale.data.tokens import load_tokenizer
    from ema_scale.models.lora import build_model
    from ema_scale.training.metrics import PlainProgress
    from ema_scale.training.trainer import DefendedTrainer

    data, model = recipe.data, recipe.model
    located = {source: locate(source) for source in data.sources}
    rows = load_rows([*located.values()], limit=data.limit, on_bad=data.on_bad, columns=data.columns, learn=data.learn)
    arguments = training_arguments(recipe, run_dir)
    # One date for the run: after a resume it is the first one, and ranks may not agree on today.
    date = broadcast_from_main(_stored_date(run_dir) or Date.today())
    tokenizer = load_tokenizer(
        locate(model.path),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        chat_template=model.chat_template,
    )
    trainer = DefendedTrainer(
        build_model(model, recipe.adapter, seed=recipe.seed),
        arguments,
        rows,
        recipe.defenses,
        recipe.reference,
        tokenizer,
        data.max_length,
        packing=recipe.training.packing,
        drift_every=recipe.training.drift_every,
        reference_runs=recipe.reference_runs,
        token_cache=cache_root() / "tokens",
        on_bad=data.on_bad,
        template_date=date,
        callbacks=[*callbacks, *([PlainProgress()] if arguments.disable_tqdm else [])],
    )
    if arguments.disable_tqdm:
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
    return trainer, {source: rows.hashes[path] for source, path in located.items()}


def _train(recipe: Recipe, run_dir: RunDir, resume: bool) -> None:
    prepare_environment(recipe.training.deepspeed, recipe.training.fsdp)
    from ema_scale.core.checkpoints import newest_complete, step_of
    from ema_scale.models.load import parameter_counts
    from ema_scale.training.metrics import MetricsWriter, truncate_metrics

    trainer, hashes = _trainer(recipe, run_dir, [MetricsWriter(run_dir)])
    along = recipe.evaluation.checkpoints
    trainer.keep_steps = frozenset(along if isinstance(along, list) else ())
    checkpoint = newest_complete(run_dir.checkpoints) if resume else None
    hashes |= trainer.data_report.hashes
    if checkpoint is not None:
        check_same_data(hashes, run_dir)
    trainer.accelerator.wait_for_everyone()  # nobody may write a checkpoint before all have looked

    weights = weights_of(recipe) if is_main() else {}

    def write_provenance() -> None:
        run_dir.write_provenance(
            recipe.to_dict(),
            hashes,
            recipe.seed,
            data_files=file_marks(hashes),
            weights=weights,
            reference=trainer.reference_choice.to_dict(),
            parameters=parameter_counts(trainer.model),
            template_date=trainer.data_report.tokens.get("date", ""),
        )

    if is_main():
        write_provenance()
        trainer.on_reference_changed = write_provenance
        atomic_write_json(run_dir.data_path, trainer.data_report.to_dict())
        for note in [*trainer.data_report.lines(), *trainer.data_report.notes]:
            log.info(note)
        truncate_metrics(run_dir.metrics_path, step_of(checkpoint) if checkpoint else 0)
        if checkpoint:
            log.info("%s: going on from step %d", run_dir.path, step_of(checkpoint))
    with _stoppable(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    destroy_process_group_at_exit()
    early = trainer.stopped_early
    if early is None and trainer.stop_agreed and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    trainer.save_model(str(run_dir.adapter))
    if is_main():
        if early is not None:
            log.info("stopped after step %d of %d: %s", trainer.state.global_step, trainer.state.max_steps, early)
        run_dir.set_status(
            "finished",
            **({} if early is None else {"stopped_early": early}),
            step=trainer.state.global_step,
            seconds=_seconds(run_dir),
            processes=trainer.args.world_size,
        )


def _stored_date(run_dir: RunDir) -> Date | None:
    """The date that the run's chat template wrote when it began."""
    if not run_dir.provenance_path.exists():
        return None
    stored = json.loads(run_dir.provenance_path.read_text(encoding="utf-8")).get("template_date")
    return Date.fromisoformat(stored) if stored else None


def training_arguments(recipe: Recipe, run_dir: RunDir) -> Any:
    """transformers' TrainingArguments of a recipe. Raises UserError for values it refuses."""
    import torch
    from transformers import TrainingArguments

    t = recipe.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir.tensorboard)
    from ema_scale.models.load import pick_dtype

    if ("8bit" in t.optimizer or "bnb" in t.optimizer) and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"training.optimizer: {t.optimizer!r} needs the bitsandbytes package, which is not installed")
    half = torch.cuda.is_available() and pick_dtype(recipe.model.dtype) == torch.bfloat16
    try:
        arguments = TrainingArguments(
            output_dir=str(run_dir.checkpoints),
            seed=recipe.seed,
            num_train_epochs=t.epochs,
            max_steps=t.max_steps,
            learning_rate=t.learning_rate,
            warmup_steps=t.warmup_steps,
            lr_scheduler_type=t.schedule,
            weight_decay=t.weight_decay,
            optim=t.optimizer,
            per_device_train_batch_size=t.batch_size,
            gradient_accumulation_steps=t.accumulation,
            max_grad_norm=t.max_grad_norm,
            gradient_checkpointing=t.gradient_checkpointing,
            train_sampling_strategy="group_by_length" if t.group_by_length else "random",
            logging_steps=t.logging_steps,
            logging_first_step=True,
            save_steps=t.save_steps,
            save_total_limit=t.keep_checkpoints,
            report_to=t.report_to or "none",
            bf16=half,
            disable_tqdm=not sys.stderr.isatty(),
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            ddp_timeout=timeout_seconds(),
            log_level="warning",
            **device_arguments(),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {error}") from None
    arguments.activation_offloading = t.activation_offload  # type: ignore[attr-defined]  # as in TRL's SFTConfig
    return arguments


def _claim(recipe: Recipe, run_dir: RunDir, resume: bool) -> None:
    run_dir.create()
    if resume:
        check_same_training(recipe, run_dir, launched_processes())
    if not resume:
        for folder in (run_dir.checkpoints, run_dir.adapter, run_dir.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (run_dir.metrics_path, run_dir.provenance_path):
            file.unlink(missing_ok=True)
    started = run_dir.status().get("started", time.time()) if resume else time.time()
    atomic_write_text(run_dir.recipe_path, recipe.to_yaml())
    run_dir.set_status("running", started=started, pid=os.getpid(), processes=launched_processes())


@contextlib.contextmanager
def _reported(run_dir: RunDir) -> Iterator[None]:
    """The status of a run that does not finish; a full disk becomes a clear error."""
    try:
        yield
    except KeyboardInterrupt:
        _end(run_dir, "stopped", "stopped by a signal; run the same command again to go on")
        raise
    except OSError as error:
        full = error.errno == errno.ENOSPC
        message = (
            f"{run_dir.path}: the disk is full; finished steps and checkpoints are kept: free space and run "
            "the same command again"
        )
        _end(run_dir, "failed", message if full else str(error))
        if full:
            raise UserError(message) from None
        raise
    except BaseException as error:
        _end(run_dir, "failed", f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise


def _end(run_dir: RunDir, state: str, reason: str) -> None:
    if is_main():
        with contextlib.suppress(OSError):  # a full disk may refuse the status too
            old = run_dir.status()
            kept = {k: old[k] for k in ("started", "processes", "max_steps") if k in old}
            run_dir.set_status(state, reason=reason, seconds=_seconds(run_dir), **kept)


def _seconds(run_dir: RunDir) -> float:
    now = time.time()
    return round(now - float(run_dir.status().get("started", now)), 1)


@contextlib.contextmanager
def _stoppable(trainer: Any) -> Iterator[None]:
    """INT, TERM and USR1 (Slurm's warning) ask for a checkpoint and a stop at the next step boundary."""

    def ask(number: int, frame: Any) -> None:
        if trainer.stop_wished and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: at once
        # A wish: the processes of a run get their signals at different moments, and agree between steps.
        trainer.stop_wished = True

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    try:
        old = {s: signal.signal(s, ask) for s in signals}
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
