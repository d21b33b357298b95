"""What is evaluated along a training: the adapter of each checkpoint, as the run's own adapter was made of its last."""

from __future__ import annotations

import logging
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_path
from ema_scale.core.run_dir import RunDir
from ema_scale.core.uri import locate
from ema_scale.defenses.base import FinishContext
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.suites import Suite
from ema_scale.recipe import Recipe

log = logging.getLogger(__name__)


def checkpoint_targets(run: RunDir, recipe: Recipe, suites: tuple[Suite, ...], export: bool = True) -> list[EvalTarget]:
    """A target for each whole checkpoint of `evaluation.checkpoints` before the last one, in eval/checkpoints/<step>.

    Their adapters are written there, unless `export` is False, after the `finish` of every defense. Steps that the
    training did not reach, because a defense ended it, are left out with a note. Raises UserError for one that it did
    reach and that has no checkpoint.
    """
    from ema_scale.core.checkpoints import is_complete, list_checkpoints, step_of

    steps = recipe.evaluation.checkpoints
    kept = {step_of(c): c for c in list_checkpoints(run.checkpoints) if is_complete(c)}
    last = run.status().step
    wanted = sorted(kept if isinstance(steps, bool) else set(steps))
    beyond = [step for step in wanted if step not in kept and isinstance(last, int) and step > last]
    if beyond and export:
        told = f"step{'s' if len(beyond) > 1 else ''} {', '.join(map(str, beyond))}"
        log.warning("%s: not asked at %s: its training ended after step %d", run.path, told, last)
    # An adapter that was not finished, as older versions left them, must not be taken for one that was.
    name = "finished" if any(d.overrides("after_training") for d in recipe.defenses) else "adapter"
    targets = []
    for step in wanted:
        if step == last or step in beyond:
            continue
        if step not in kept:
            found = ", ".join(map(str, sorted(kept))) or "none"
            raise UserError(
                f"{run.path}: evaluation.checkpoints: no whole checkpoint of step {step}; there are: {found}"
            )
        folder = run.eval_dir / "checkpoints" / str(step)
        if export:
            _export(kept[step], run, recipe, folder / name)
        targets.append(EvalTarget(f"{run.path.name}@{step}", folder / name, folder, suites))
    return targets


def _export(checkpoint: Path, run: RunDir, recipe: Recipe, out: Path) -> None:
    from ema_scale.models.checkpoint_adapter import export_adapter

    finishing = [defense for defense in recipe.defenses if defense.overrides("after_training")]
    if not finishing or out.is_dir():
        export_adapter(checkpoint, run.adapter, out)
        return
    context = FinishContext(locate(recipe.model.path), recipe.model.revision, recipe.seed, notify=lambda text: None)
    with atomic_path(out) as unfinished:
        export_adapter(checkpoint, run.adapter, unfinished)
        for defense in finishing:
            defense.after_training(unfinished, context)
