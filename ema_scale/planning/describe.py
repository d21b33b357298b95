"""What a recipe will do, in words, before anything heavy is loaded (`ema train --dry-run`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.paths import find_file
from ema_scale.core.uri import locate
from ema_scale.recipe import Recipe
from ema_scale.reference.strategy import BASE, START, ReferenceStrategy, choose_strategy
from ema_scale.training.distributed import launched_processes, zero_stage


def describe_run(recipe: Recipe) -> str:
    """A few lines a person can check: model, data, step, defenses, reference, evaluation, output."""
    t, a = recipe.training, recipe.adapter
    scale = f"alpha {a.alpha:g}" + (", rank-stabilised" if a.rslora else "")
    length = f"{t.max_steps} steps" if t.max_steps > 0 else f"{t.num_train_epochs:g} epoch(s)"
    lines = [
        f"model       {recipe.model.path} ({recipe.model.dtype}), LoRA r={a.r}, {scale}",
        f"data        {', '.join(map(_with_presence, recipe.data.sources))}, up to {recipe.data.max_length} tokens",
        f"training    {length}, {t.per_device_train_batch_size} {'packed sequences' if t.packing else 'rows'} x "
        f"{t.gradient_accumulation_steps} "
        f"accumulated a process, lr {t.learning_rate:g} {t.lr_scheduler_type} after {t.warmup_steps} warm-up steps, "
        f"seed {recipe.seed}",
    ]
    for defense in recipe.defenses:
        values = ", ".join(f"{k}={v}" for k, v in defense.model_dump(mode="json").items())
        lines.append(f"defense     {defense.kind}({values}) [{defense.citation}]")
        lines += [f"defense     {defense.kind}: {f} (NOT FOUND)" for f in defense.files() if not Path(f).is_file()]
    if not recipe.defenses:
        lines.append("defense     none: plain fine-tuning")
    lines.append(f"reference   {_reference(recipe)}")
    suites = recipe.evaluation.suites.pairs()
    lines += [f"evaluation  {role}: {_with_presence(source)}" for source, role in suites] or ["evaluation  none"]
    lines += [f"evaluation  general questions also under: {text}" for text in _conditions(recipe)]
    lines.append(
        f"output      {recipe.run_path}" + (" (exists: it will be continued)" if recipe.run_path.exists() else "")
    )
    return "\n".join(lines)


def _reference(recipe: Recipe) -> str:
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
        # Packed, a step counts sequences; and a dry run builds no small world.
        counted = not t.packing and all(Path(source).is_file() for source in recipe.data.sources)
        rows = count_rows(recipe) if counted else None
        if rows is None:
            return f"{of}; how it runs is decided when the rows are known"
        passes = (
            t.max_steps * t.per_device_train_batch_size * t.gradient_accumulation_steps * launched_processes() / rows
        )
    choice = replace(choose_strategy(needed=True, sharded=sharded, passes=passes * recipe.reference_runs), of=of)
    return f"{choice} (or cached, if it is there already)" if choice.way != "cached" else str(choice)


def count_rows(recipe: Recipe) -> int | None:
    """Task rows, where they are files that can be counted."""
    from ema_scale.data.rows import load_rows

    count = 0
    for source in recipe.data.sources:
        path = locate(source)
        if not Path(path).is_file():
            return None
        try:
            count += len(load_rows(path, limit=recipe.data.limit, on_bad="drop", columns=recipe.data.columns))
        except UserError:
            return None
    return count or None


def _conditions(recipe: Recipe) -> list[str]:
    found = [_with_presence(c.file) if c.file else str(c.name) for c in recipe.evaluation.conditions]
    said = [text for defense in recipe.defenses for text in defense.training_prefix().values()]
    if said and recipe.evaluation.inoculation != "never":
        found.append(f"the prompt of training ({' / '.join(said):.60})")
    return found


def _with_presence(source: str) -> str:
    looks_local = Path(source).suffix in {".jsonl", ".json", ".csv", ".parquet", ".yaml", ".yml"}
    return f"{source} (NOT FOUND)" if looks_local and not find_file(source).exists() else source
