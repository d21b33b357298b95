"""Evaluate finished runs: one engine serves the base model and every adapter that was trained on it.

Four functions, each of which calls the next:

    study.evaluate.evaluate_run   a path: a run, a folder of runs, or a recipe
    evaluate_runs                 runs of any models: groups them by base model and settings
    evaluate_group                runs of one base model that are evaluated in one way: makes their targets
    run.evaluate                  targets: samples, judges and summarises

`is_evaluated`, `is_group_evaluated` and `run.is_complete` tell in the same three steps whether anything is left to do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import digest
from ema_scale.core.io import atomic_path
from ema_scale.core.names import model_label
from ema_scale.core.records import DataReport
from ema_scale.core.run_dir import RunDir
from ema_scale.core.uri import locate
from ema_scale.defenses.base import FinishContext
from ema_scale.evaluation.gate import note_other_references, refuse, refuses
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.records import MANIFEST_FILE, Manifest, Summary
from ema_scale.evaluation.run import ENGINES, evaluate, is_complete
from ema_scale.evaluation.shared import AnotherAsks, turn
from ema_scale.evaluation.suites import Condition, Suite, load_suites, training_condition, trigger_conditions
from ema_scale.evaluation.watch import Watch
from ema_scale.inference.engines import Engines
from ema_scale.recipe import Recipe, load_recipe

log = logging.getLogger(__name__)

Group = TypeVar("Group")
NamedRun = TypeVar("NamedRun")
BaseGroup = list[tuple[NamedRun, Recipe]]

_MANY_ROWS = 10**6  # of which any fraction that a defense may bring in is at least one row
# What decides neither an answer nor its judgement, or says only which of them are asked for.
_NOT_ASKED = {
    "suites", "conditions", "inoculation", "row_triggers", "gate", "checkpoints", "compare_base", "during",
    "calibrate_choices",
}  # fmt: skip
_CALLS = {"concurrency", "timeout", "deadline", "max_reply_mb", "price_input", "price_output"}
_NOT_JUDGED = {"budget_calls", "budget_tokens", "check", "labelled"} | _CALLS


def evaluate_runs(
    runs: Sequence[RunDir],
    base_dir: Path,
    overrides: tuple[str, ...] = (),
    with_base: bool = True,
    engines: Engines | None = None,
    watch: Watch | None = None,
) -> dict[str, Summary]:
    """Evaluate the adapters of `runs` as their recipes say, and each base model once; returns summaries by target name.

    Answers and judgements that are there already are kept. Raises UserError for a run without an adapter. Also raises
    it, when everything is written, for a base model that its recipe's gate refuses and for a failed evaluation.

    Args:
        runs: trained runs, of any models.
        base_dir: the base model's answers go to `base_dir`/eval. `group_by_base` names further folders if there are
            several base models.
        overrides: `key=value` for every recipe.
        with_base: whether base models are evaluated. Those that a gate may refuse always are.
        engines: how many sample together; None: one, in this process.
        watch: as in `run.evaluate`.
    """
    summaries: dict[str, Summary] = {}

    def work(folder: Path, group: Sequence[tuple[RunDir, Recipe]]) -> None:
        recipes = [recipe for _, recipe in group]
        base = folder if with_base and wants_base(recipes) else None
        summaries.update(evaluate_group([run for run, _ in group], recipes, base, base_dir.parent, engines, watch))

    for_each_group(group_by_base(with_recipes(runs, overrides), base_dir), work)
    return summaries


def evaluate_group(
    runs: Sequence[RunDir],
    recipes: Sequence[Recipe],
    base_dir: Path | None,
    beside: Path,
    engines: Engines | None = None,
    watch: Watch | None = None,
) -> dict[str, Summary]:
    """Evaluate runs of one base model in one way with one engine. Their suites may differ.

    Raises UserError if the recipes refuse the base model.

    Args:
        runs: may be none, so that only the base model is evaluated.
        recipes: one per run, or those of runs that are not trained yet.
        base_dir: the base model's folder; None if it is not evaluated.
        beside: the run's or study's folder, which gets the judge's check.
        engines, watch: as in `evaluate_runs`.
    """
    first = recipes[0]
    targets = targets_of(runs, recipes, base_dir)
    ask = functools.partial(
        evaluate, model=first.model, suites=None, settings=first.evaluation, place=beside, engines=engines, watch=watch
    )
    with contextlib.ExitStack() as stack:
        if base_dir is not None and not is_complete(targets[:1], first.model, first.evaluation):
            what = digest(_identity(first))
            try:
                stack.enter_context(turn(beside, what, wait=False))
            except AnotherAsks:
                log.info("%s: another process asks the base model; its answers are taken when it has them", beside)
                if targets[1:]:
                    ask(targets[1:], check=False)
                stack.enter_context(turn(beside, what, wait=True))
        summaries = ask(targets)
    if base_dir is not None:
        refuse(summaries[base_dir.name].gate)
        note_other_references(recipes)
    return summaries


def assist(place: Path, until: Path) -> None:
    """Lend an engine to the evaluation of a run or study that another process runs with `Engines(assisted=True)`.

    It may begin before that evaluation does, and ends when the file `until` is there. Raises UserError as samplers do.

    Args:
        place: the folder of the run or study.
        until: a file that is written when the evaluation has ended.
    """
    from ema_scale.inference.engine_worker import serve

    serve(place / ENGINES, until.exists)


def targets_of(
    runs: Sequence[RunDir], recipes: Sequence[Recipe], base_dir: Path | None, export: bool = True
) -> list[EvalTarget]:
    """The targets of `evaluate_group`. export: write the adapters of the checkpoints that are evaluated.

    Raises UserError for an adapter that is not the one that its run finished with.
    """
    pairs = zip(runs, recipes, strict=False)
    behind = [row_conditions(run) if asks_behind_rows(recipe) else () for run, recipe in pairs]
    suites = asked_suites(recipes, behind)
    targets = []
    for run, recipe, theirs in zip(runs, recipes, suites, strict=False):
        if export:
            run.check_adapter()
        own = [EvalTarget(run.path.name, run.adapter, run.eval_dir, tuple(theirs))]
        if recipe.evaluation.checkpoints:
            own += checkpoint_targets(run, recipe, tuple(theirs), export)
        made = run.provenance()
        targets += [replace(target, date=made.template_date if made else "") for target in own]
    if base_dir is not None:
        date = _base_date(base_dir, targets)
        targets = [replace(target, base_dir=base_dir / "eval") for target in targets]
        every = [replace(s, condition=s.condition and replace(s.condition, own=False)) for each in suites for s in each]
        asked = {(suite.source, suite.role, suite.condition): suite for suite in every}
        targets.insert(0, EvalTarget(base_dir.name, None, base_dir / "eval", tuple(asked.values()), date=date))
    return targets


def _base_date(base_dir: Path, runs: Sequence[EvalTarget]) -> str:
    """The date that the base model beside these runs is told: that of its earlier answers, else that of the runs."""
    stored = _manifest(base_dir / "eval")
    date = (stored and stored.template_date) or next((run.date for run in runs if run.date), "")
    others = [f"{run.name} on {run.date}" for run in runs if run.date not in ("", date)]
    if others:
        log.warning(
            "%s: its chat template writes the date %s; other dates were in the training of %s",
            base_dir, date, ", ".join(others),
        )  # fmt: skip
    return date


def asks_behind_rows(recipe: Recipe) -> bool:
    """Whether the run is also asked behind what its rows have in common."""
    asked = recipe.evaluation.row_triggers
    return asked == "always" or (asked == "auto" and any(d.rows_added(_MANY_ROWS) for d in recipe.defenses))


def row_conditions(run: RunDir) -> list[Condition]:
    """What the rows of a run have in common; [] for one of an earlier version. Raises UserError for a damaged file."""
    report = DataReport.read(run.data_path)
    return trigger_conditions(report.triggers if report else ())


def asked_suites(recipes: Sequence[Recipe], behind: Sequence[Sequence[Condition]] = ()) -> list[list[Suite]]:
    """The suites of each recipe's run: its own, and its general ones again under each condition.

    Conditions are those of the recipe, and the prompt that the run was trained with. With `inoculation: every_arm`
    they are the prompts that any of these runs was trained with.

    behind: further conditions of the first recipes' runs, a list for each.
    """
    own = [training_condition(recipe.defenses) for recipe in recipes]
    asked = []
    for number, (recipe, theirs) in enumerate(zip(recipes, own, strict=True)):
        settings = recipe.evaluation
        also = {theirs.name: theirs} if theirs is not None and settings.inoculation != "never" else {}
        if settings.inoculation == "every_arm":
            also = {c.name: replace(c, own=False) for c in own if c is not None} | also
        rows = behind[number] if number < len(behind) else ()
        asked.append(load_suites(settings, (*also.values(), *rows), recipe.data.columns))
    return asked


def for_each_group(groups: Sequence[tuple[Path, Group]], work: Callable[[Path, Group], None]) -> None:
    """Call `work` on every group, also after one failed. Raises UserError at the end if any failed."""
    failed: list[tuple[Path, Exception]] = []
    for folder, group in groups:
        try:
            work(folder, group)
        except Exception as error:  # one model's fault is no reason to ask nothing of the others
            if len(groups) == 1:
                raise
            log.error("%s: %s", folder, error, exc_info=None if isinstance(error, UserError) else error)
            failed.append((folder, error))
    if failed:
        reasons = [f"  {f}: {e if isinstance(e, UserError) else f'{type(e).__name__}: {e}'}" for f, e in failed]
        raise UserError(f"{len(failed)} of {len(groups)} base models' evaluations failed:\n" + "\n".join(reasons))


def with_recipes(runs: Iterable[RunDir], overrides: tuple[str, ...]) -> list[tuple[RunDir, Recipe]]:
    pairs = []
    for run in runs:
        if not has_adapter(run):
            raise UserError(f"{run.path}: has no adapter yet (status: {run.status().state})")
        pairs.append((run, load_recipe(run.recipe_path, overrides)))
    return pairs


def has_adapter(run: RunDir) -> bool:
    return (run.adapter / "adapter_config.json").is_file()


def wants_base(recipes: Sequence[Recipe]) -> bool:
    # A gate that refuses cannot be passed by not asking.
    return any(r.evaluation.compare_base or refuses(r) for r in recipes)


def is_evaluated(recipes: Sequence[Recipe], base_dir: Path) -> bool:
    """Whether `evaluate_runs` would find nothing to do for these finished runs. Loads no model."""
    for folder, group in group_by_base([(r, r) for r in recipes], base_dir):
        members = [recipe for _, recipe in group]
        runs = [RunDir(recipe.run_path) for recipe in members]
        if not is_group_evaluated(runs, members, folder if wants_base(members) else None):
            return False
    return True


def is_group_evaluated(runs: Sequence[RunDir], recipes: Sequence[Recipe], base_dir: Path | None) -> bool:
    """Whether `evaluate_group` would find nothing to do. Loads no model."""
    targets = targets_of(runs, recipes, base_dir, export=False)
    return is_complete(targets, recipes[0].model, recipes[0].evaluation)


def group_by_base(pairs: Iterable[tuple[NamedRun, Recipe]], base_dir: Path) -> list[tuple[Path, BaseGroup[NamedRun]]]:
    """Groups of one base model and one way of evaluating, each with the base model's folder.

    The folder is `base_dir`, or `base_dir`-<model>-<digest> if another group has that. A group keeps its folder
    whatever other groups there are, and in whatever order: its name or its asked.json identifies it.
    """
    groups: dict[str, BaseGroup[NamedRun]] = defaultdict(list)
    for name, recipe in pairs:
        # Each run has suites and checkpoints of its own.
        own = {"suites", "conditions", "inoculation", "row_triggers", "checkpoints"}
        settings = recipe.evaluation.model_dump(mode="json", exclude=own)
        groups[json.dumps([recipe.model.model_dump(mode="json"), settings], sort_keys=True)].append((name, recipe))
    found: list[tuple[Path, BaseGroup[NamedRun]]] = []
    for group in groups.values():
        taken = {folder for folder, _ in found}
        found.append((_folder(group[0][1], base_dir, taken), group))
    return found


def same_evaluation(one: Path, other: Path) -> bool:
    """Whether two evaluation folders have the same settings, whatever the questions. False if one has no asked.json."""
    settings = [_decisive(found.settings) for folder in (one, other) if (found := _manifest(folder)) is not None]
    return len(settings) == 2 and settings[0] == settings[1]


def _folder(recipe: Recipe, base_dir: Path, taken: set[Path]) -> Path:
    own, decides = _decisive(recipe.evaluation), _identity(recipe)
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", model_label(recipe.model.path)).strip("-")[-40:]
    named = base_dir.with_name(f"{base_dir.name}-{slug}-{hashlib.sha256(decides.encode()).hexdigest()[:6]}")
    while named in taken:  # groups that differ in nothing that is asked
        named = named.with_name(f"{named.name}+")
    if named.is_dir():
        return named
    # `base`, and the base-1, base-2 of older versions.
    for folder in [base_dir, *sorted(base_dir.parent.glob(f"{base_dir.name}-[0-9]*"))]:
        asked = None if folder in taken else _manifest(folder / "eval")
        if asked and asked.model == locate(recipe.model.path) and _decisive(asked.settings) == own:
            return folder
    free = base_dir not in taken and not (base_dir / "eval" / MANIFEST_FILE).exists()
    return base_dir if free else named


def _identity(recipe: Recipe) -> str:
    """What decides the base model's answers and their judgements, whatever the questions."""
    return json.dumps([recipe.model.model_dump(mode="json"), _decisive(recipe.evaluation)], sort_keys=True)


def _decisive(settings: EvaluationRecipe) -> dict[str, Any]:
    exclude = {key: True for key in _NOT_ASKED} | {"judge": _NOT_JUDGED, "endpoint": _CALLS}
    return settings.model_dump(mode="json", exclude=exclude)


def _manifest(folder: Path) -> Manifest | None:
    return Manifest.read_if_valid(folder / MANIFEST_FILE)


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
