"""Train one recipe into one run folder, and resume it where it stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date as Date
from typing import TYPE_CHECKING, Any

from ema_scale.core.disk import CannotWrite, writing
from ema_scale.core.errors import UserError
from ema_scale.core.imports import without_garbage_collection
from ema_scale.core.io import atomic_write_text
from ema_scale.core.records import Provenance
from ema_scale.core.run_dir import RunDir, trained_questions
from ema_scale.training.distributed import (
    destroy_process_group_at_exit,
    is_main,
    launched_processes,
    prepare_environment,
)
from ema_scale.training.loggers import drop_later_steps, logger_environment
from ema_scale.training.resume_check import ExistingRun, check_same_data, file_marks, renew_recipe, weights_of

if TYPE_CHECKING:
    from ema_scale.recipe import Recipe
    from ema_scale.reference.cache_fill import FillStats
    from ema_scale.training.callbacks import StopFlag
    from ema_scale.training.trainer import DefendedTrainer

log = logging.getLogger(__name__)


def train(recipe: Recipe, run_dir: RunDir, resume: bool = True) -> RunDir:
    """Train `recipe` into `run_dir`: adapter/, metrics.jsonl, checkpoints/, data.json, provenance, status.

    Call it again after a stop, a crash or a full disk: it resumes from the newest complete checkpoint and ends with the
    same adapter. A finished run of the same training is left as it is. Under `accelerate launch` or torchrun, every
    process calls it.

    resume: False starts over.

    Raises UserError for bad input, a folder that holds another training, a loss that is not finite and a full disk;
    KeyboardInterrupt after a signal (INT, TERM, USR1), with a checkpoint saved.
    """
    existing = ExistingRun(recipe, run_dir)
    if resume and existing.finished:
        if is_main():
            run_dir.check_adapter()
            log.info("%s: finished already", run_dir.path)
            renew_recipe(recipe, run_dir)
        return run_dir
    with run_dir.lock() if is_main() else contextlib.nullcontext():
        if is_main():
            _claim(recipe, run_dir, existing if resume else None)
        with _report_failure(run_dir), logger_environment(run_dir):
            _train(recipe, run_dir, resume)
    return run_dir


def fill_cache(recipe: Recipe) -> FillStats:
    """Compute the cached reference of a recipe's rows ahead of training. Every process of a launch computes its part.

    Raises UserError as `train` does, under DeepSpeed, and if no defense reads the reference; KeyboardInterrupt after a
    signal, when the states computed so far are on disk.
    """
    _prepare_process(recipe)
    from ema_scale.training.reference_setup import prepare_reference

    if not any(d.needs_reference for d in recipe.defenses):
        raise UserError("defenses: none of them reads the reference; there is nothing to cache")
    recipe = recipe.model_copy(update={"reference": "cached"})
    trainer, _ = _trainer(recipe, RunDir(recipe.run_path), [])
    if trainer.is_deepspeed_enabled:
        raise UserError("ema cache runs without DeepSpeed; under ZeRO-3 `ema train` fills the cache when it starts")
    with stop_on_signals(trainer.stop):
        stats = prepare_reference(trainer.defended.reference, trainer)
    assert stats is not None
    return stats


def _prepare_process(recipe: Recipe) -> None:
    with without_garbage_collection():
        prepare_environment(recipe.training.deepspeed, recipe.training.fsdp)
        from ema_scale.training import trainer  # noqa: F401


def _trainer(recipe: Recipe, run_dir: RunDir, callbacks: list[Any]) -> tuple[DefendedTrainer, dict[str, str]]:
    """The trainer of a recipe, and source -> sha256 of its rows."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    from ema_scale.core.collectives import broadcast_from_main
    from ema_scale.core.paths import cache_root
    from ema_scale.core.uri import locate
    from ema_scale.data.rows import RowSource
    from ema_scale.data.tokens import load_tokenizer
    from ema_scale.models.lora import build_model
    from ema_scale.training.arguments import training_arguments
    from ema_scale.training.metrics import BarProgress, PlainProgress
    from ema_scale.training.trainer import DefendedTrainer

    data, model = recipe.data, recipe.model
    located = {source: locate(source) for source in data.sources}
    rows = RowSource([*located.values()], data.limit, data.on_bad, data.columns, data.learn)
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
        choice_suites=recipe.evaluation.during.suites,
        choices_every=recipe.evaluation.during.every,
        callbacks=callbacks,
    )
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    trainer.add_callback((PlainProgress if arguments.disable_tqdm else BarProgress)(trainer.row_groups.loss_names))
    return trainer, {source: rows.hashes[path] for source, path in located.items()}


def _train(recipe: Recipe, run_dir: RunDir, resume: bool) -> None:
    _prepare_process(recipe)
    from ema_scale.core.checkpoints import newest_complete, step_of
    from ema_scale.data.report import cut_line, report_lines
    from ema_scale.models.load import parameter_counts
    from ema_scale.training.metrics import MetricsWriter, truncate_metrics

    trainer, hashes = _trainer(recipe, run_dir, [MetricsWriter(run_dir)])
    steps = recipe.evaluation.checkpoints
    trainer.keep_steps = frozenset(steps if isinstance(steps, list) else ())
    checkpoint = newest_complete(run_dir.checkpoints) if resume else None
    hashes |= trainer.data_report.hashes
    if checkpoint is not None:
        check_same_data(hashes, run_dir)
    trainer.accelerator.wait_for_everyone()  # nobody may write a checkpoint before all have looked

    weights = weights_of(recipe) if is_main() else {}

    def write_provenance() -> None:
        Provenance.of_this_process(
            recipe=recipe.to_dict(),
            label=" + ".join(defense.label() for defense in recipe.defenses),
            data_sha256=hashes,
            seed=recipe.seed,
            data_files=file_marks(hashes),
            weights=weights,
            reference=asdict(trainer.reference_choice),
            parameters=parameter_counts(trainer.model),
            template_date=trainer.data_report.tokens.get("date", ""),
        ).write(run_dir.provenance_path)

    if is_main():
        write_provenance()
        trainer.on_reference_changed = write_provenance
        trainer.data_report.write(run_dir.data_path)
        if (questions := trainer.data_report.questions) is not None:
            if start := recipe.adapter.start:
                questions = questions.after(trained_questions(start), start)
            questions.write(run_dir.questions_path)
        for note in [*report_lines(trainer.data_report), *trainer.data_report.notes]:
            if note != cut_line(trainer.data_report):  # which the trainer has warned of
                log.info(note)
        reached = step_of(checkpoint) if checkpoint else 0
        truncate_metrics(run_dir.metrics_path, reached)
        drop_later_steps(trainer, run_dir, reached)
        if checkpoint:
            log.info("%s: going on from step %d", run_dir.path, step_of(checkpoint))
    with stop_on_signals(trainer.stop):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    destroy_process_group_at_exit()
    if trainer.interrupted:
        raise KeyboardInterrupt
    early = trainer.stopped_early
    trainer.save_model(str(run_dir.adapter))
    if is_main():
        if early is not None:
            log.info("stopped after step %d of %d: %s", trainer.state.global_step, trainer.state.max_steps, early)
        run_dir.set_status(
            "finished",
            stopped_early=early,
            step=trainer.state.global_step,
            seconds=_seconds(run_dir),
            processes=trainer.args.world_size,
            adapter=run_dir.describe_adapter(),
        )


def _stored_date(run_dir: RunDir) -> Date | None:
    """The date that the run's chat template wrote when it began."""
    provenance = run_dir.provenance()
    return Date.fromisoformat(provenance.template_date) if provenance and provenance.template_date else None


def _claim(recipe: Recipe, run_dir: RunDir, existing: ExistingRun | None) -> None:
    """Make the folder this recipe's, status "running". existing: what to resume; None: start over."""
    run_dir.create()
    if existing is not None:
        existing.check_same_training(launched_processes())
    else:
        for folder in (run_dir.checkpoints, run_dir.adapter, run_dir.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (run_dir.metrics_path, run_dir.provenance_path):
            file.unlink(missing_ok=True)
    started = (None if existing is None else run_dir.status().started) or time.time()
    atomic_write_text(run_dir.recipe_path, recipe.to_yaml())
    run_dir.set_status("running", started=started, pid=os.getpid(), processes=launched_processes())


@contextlib.contextmanager
def _report_failure(run_dir: RunDir) -> Iterator[None]:
    """Writes the status of a run that does not finish. What the disk refuses becomes a clear error."""
    try:
        with writing(run_dir.path):
            yield
    except KeyboardInterrupt:
        _end(run_dir, "stopped", "stopped by a signal; run the same command again to resume")
        raise
    except CannotWrite as error:
        _end(run_dir, "failed", str(error))
        raise
    except BaseException as error:
        _end(run_dir, "failed", f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise


def _end(run_dir: RunDir, state: str, reason: str) -> None:
    if is_main():
        with contextlib.suppress(OSError):  # a full disk may refuse the status too
            run_dir.set_status(state, keep=True, reason=reason, seconds=_seconds(run_dir))


def _seconds(run_dir: RunDir) -> float:
    now = time.time()
    return round(now - (run_dir.status().started or now), 1)


@contextlib.contextmanager
def stop_on_signals(stop: StopFlag) -> Iterator[None]:
    """INT, TERM and USR1 (Slurm's warning) request a checkpoint and a stop at the end of the step."""

    def request(number: int, frame: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: at once
        stop.requested = True

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    try:
        old = {s: signal.signal(s, request) for s in signals}
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
