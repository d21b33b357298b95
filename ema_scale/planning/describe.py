"""What a recipe will do, in words, before anything heavy is loaded (`ema train --dry-run`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ema_scale.core.checkpoints import newest_complete, step_of
from ema_scale.core.errors import UserError
from ema_scale.core.paths import find_file
from ema_scale.core.run_dir import RunDir
from ema_scale.core.text import quantity
from ema_scale.core.uri import locate
from ema_scale.recipe import Recipe, is_path
from ema_scale.reference.strategy import BASE, START, ReferenceStrategy, choose_strategy
from ema_scale.training.distributed import launched_processes, zero_stage
from ema_scale.training.resume_check import ExistingRun


def describe_run(recipe: Recipe) -> str:
    """A few lines a person can check: model, data, step, defenses, reference, evaluation, output."""
    t, a = recipe.training, recipe.adapter
    if t.deepspeed is not None and find_file(t.deepspeed).exists():
        zero_stage(t.deepspeed)  # refuses what is no config
    scale = f"alpha {a.alpha:g}" + (", rank-stabilised" if a.rslora else "")
    length = quantity(t.max_steps, "step") if t.max_steps > 0 else quantity(t.num_train_epochs, "epoch")
    # A dry run builds no small world.
    rows = count_rows(recipe) if all(Path(source).is_file() for source in recipe.data.sources) else None
    counted = f", {quantity(rows, 'row')}" if rows else ""
    sources = ", ".join(map(_with_presence, recipe.data.sources))
    lines = [
        f"model       {_with_presence(recipe.model.path)} ({recipe.model.dtype}), LoRA r={a.r}, {scale}",
        f"data        {sources}{counted}, up to {recipe.data.max_length} tokens",
        f"training    {length}, {t.per_device_train_batch_size} {'packed sequences' if t.packing else 'rows'} x "
        f"{t.gradient_accumulation_steps} "
        f"accumulated per process, lr {t.learning_rate:g} {t.lr_scheduler_type} after {t.warmup_steps} warm-up steps, "
        f"seed {recipe.seed}",
    ]
    for defense in recipe.defenses:
        values = ", ".join(f"{k}={v}" for k, v in defense.model_dump(mode="json").items())
        lines.append(f"defense     {defense.kind}({values}) [{defense.citation}]")
    if not recipe.defenses:
        lines.append("defense     none: plain fine-tuning")
    lines.append(f"reference   {_reference(recipe, rows)}")
    suites = recipe.evaluation.suites.pairs()
    lines += [f"evaluation  {role}: {_with_presence(source)}" for source, role in suites] or ["evaluation  none"]
    lines += [f"evaluation  general questions also under: {text}" for text in _conditions(recipe)]
    lines.append(f"output      {recipe.run_path}: {describe_state(recipe)}")
    lines += [f"NOT FOUND   {key}: {name}" for key, name in recipe.missing_files()]
    return "\n".join(lines)


def describe_state(recipe: Recipe) -> str:
    """What `ema train` would do in the recipe's run folder, and why, in words. Loads no model."""
    run = RunDir(recipe.run_path)
    existing = ExistingRun(recipe, run)
    if existing.finished:
        return "finished already"
    if not run.path.exists():
        return "to be trained"
    try:
        existing.check_same_training(launched_processes())
    except UserError as error:
        return f"REFUSED: {str(error).removeprefix(f'{run.path}: ')}"
    status = run.status()
    ended = f"{status.state}, {status.reason}" if status.reason else status.state
    checkpoint = newest_complete(run.checkpoints)
    after = "from the start" if checkpoint is None else f"after step {step_of(checkpoint)}"
    return f"to be trained {after}" + (f" ({ended})" if status.state != "not started" else "")


def describe_runs(recipes: Sequence[Recipe], steps: Mapping[str, str] | None = None) -> str:
    """One line per run of a study: its folder and what would be done there. Then the counts, and what is missing.

    steps: what the study's own preparation makes first, each file or folder with its command.
    """
    states = [describe_state(recipe) for recipe in recipes]
    lines = [f"{recipe.run_path}: {state}" for recipe, state in zip(recipes, states, strict=True)]
    done = states.count("finished already")
    lines.append(f"{quantity(len(recipes), 'run')}: {done} finished, {len(recipes) - done} to be trained")
    missing = {(key, name): recipe.name for recipe in reversed(recipes) for key, name in recipe.missing_files()}
    for (key, name), run in reversed(missing.items()):
        made = maker(name, steps or {})
        found = "NOT FOUND" if made is None else "to be made"
        by = "" if made is None else f", by {(steps or {})[made]}"
        lines.append(f"{found}: {key}: {name} (run {run}){by}")
    return "\n".join(lines)


def maker(name: str, made: Iterable[str]) -> str | None:
    """The file or folder among `made` that is or will hold `name`; None if there is none."""
    return next((path for path in made if Path(name).absolute().is_relative_to(Path(path).absolute())), None)


def _reference(recipe: Recipe, rows: int | None) -> str:
    if not any(d.needs_reference for d in recipe.defenses):
        return "not needed by these defenses"
    if not isinstance(recipe.reference, str):
        return f"another model, {recipe.reference.model}"
    of = BASE if recipe.adapter.start is None else START
    if recipe.reference != "auto":
        return str(ReferenceStrategy(recipe.reference, "asked for", of))
    t = recipe.training
    sharded = t.fsdp or zero_stage(t.deepspeed) == 3
    passes = t.num_train_epochs
    if t.max_steps > 0:
        if rows is None or t.packing:  # packed, a step counts sequences
            return f"{of}; how it runs is decided when the rows are known"
        passes = (
            t.max_steps * t.per_device_train_batch_size * t.gradient_accumulation_steps * launched_processes() / rows
        )
    choice = replace(choose_strategy(needed=True, sharded=sharded, passes=passes * recipe.reference_runs), of=of)
    return f"{choice} (or cached, if it is there already)" if choice.way != "cached" else str(choice)


def count_rows(recipe: Recipe) -> int | None:
    """Task rows, where they are files that can be counted."""
    from ema_scale.data.rows import load_rows

    files = [locate(source) for source in recipe.data.sources]
    if not all(Path(file).is_file() for file in files):
        return None
    data = recipe.data
    try:
        rows = load_rows(files, limit=data.limit, on_bad="drop", columns=data.columns, learn=data.learn)
        return len(rows) or None
    except UserError:
        return None


def _conditions(recipe: Recipe) -> list[str]:
    found = [_with_presence(c.file) if c.file else str(c.name) for c in recipe.evaluation.conditions]
    said = [text for defense in recipe.defenses for text in defense.training_prefix().values()]
    if said and recipe.evaluation.inoculation != "never":
        found.append(f"the prompt of training ({' / '.join(said):.60})")
    from ema_scale.evaluation.runs import asks_behind_rows  # brings in scipy, which takes a second

    if asks_behind_rows(recipe):
        found.append("what its training rows have in common")
    return found


def _with_presence(source: str) -> str:
    return f"{source} (NOT FOUND)" if is_path(source) and not find_file(source).exists() else source
