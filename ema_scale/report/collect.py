"""Run folders -> records. A missing or broken file becomes a note in the report, not a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_yaml
from ema_scale.core.io import read_jsonl
from ema_scale.core.names import model_key, task_key
from ema_scale.core.records import DataReport, Provenance, RunStatus
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation.records import SUMMARY_FILE, Rate, SuiteSummary, Summary
from ema_scale.evaluation.runs import same_evaluation
from ema_scale.report.aggregate import mean_rate
from ema_scale.report.conditional import base_conditions, known_conditions
from ema_scale.report.display_names import BASE, distinct_labels, model_names, short_label, spec_key, task_names
from ema_scale.report.records import (
    CHOICE_METRICS,
    METRICS,
    Collection,
    Metrics,
    Problem,
    Run,
    has_numbers,
    known_rate,
    known_rates,
)
from ema_scale.report.relearning import without_continued
from ema_scale.report.run_details import missing_runs
from ema_scale.report.unseen import TaskQuestions, unseen_questions

T = TypeVar("T")


def collect(run_dirs: Sequence[Path]) -> Collection:
    """Read every run folder, and the evaluation of the base model of each.

    A folder that does not exist is listed as not started. Raises UserError if none is a run folder.
    """
    collection = Collection(requested=len(run_dirs))
    run_dirs = [Path(p) for p in run_dirs]
    any_run = False
    for path in run_dirs:
        if not path.is_dir():
            collection.problems.append(Problem(path.name, "not started", f"no folder at {path}"))
        elif RunDir(path).recipe_path.is_file() or RunDir(path).status_path.is_file():
            any_run = True
            _read_run(path, collection)
        elif (published := _read_published(path)) is not None:
            any_run = True
            collection.runs.append(published)
        elif (path / "slurm").is_dir():
            collection.problems.append(Problem(path.name, "not started", f"see its job's log: ema logs {path}"))
        elif not _base_summaries([path / "eval"]):
            collection.problems.append(Problem(path.name, "note", "no recipe.yaml: not a run folder, left out"))
    if not any_run:
        given = ", ".join(str(p) for p in run_dirs) or "no folder at all"
        raise UserError(f"report: found no run folder among {given}; expected folders with a recipe.yaml")
    collection.runs, continued = without_continued(collection.runs)
    collection.requested -= len(continued)
    stored = {spec_key(run.specs): run.provenance.label for run in collection.runs if run.provenance.label}
    labels = distinct_labels((run.specs for run in collection.runs), stored)
    models = model_names(run.model for run in collection.runs)
    tasks = task_names(run.task for run in collection.runs)
    collection.runs = [
        replace(run, model=models[run.model], task=tasks[run.task], label=labels[spec_key(run.specs)])
        for run in collection.runs
    ]
    apart = unseen_questions(collection.runs)
    collection.runs = [_on_unseen(run, apart[run.task], collection.problems) for run in collection.runs]
    tasks_by_path = {run.path: run.task for run in collection.runs}
    for one in continued:
        task = tasks_by_path[one.path]
        collection.continued.append(replace(one, run=_on_unseen(one.run, apart[task], collection.problems)))
    collection.bases = _base_runs(collection.runs, run_dirs, apart)
    collection.problems += [Problem(run, "note", text) for task in apart.values() for run, text in task.notes]
    collection.seen = {task: found.text for task, found in apart.items()}
    collection.problems += missing_runs(collection)
    return collection


def _read_run(path: Path, collection: Collection) -> None:
    """Add the run to `collection.runs` if it counts, else a line to `collection.problems`."""
    folder, problems = RunDir(path), collection.problems

    def note(text: str) -> None:
        problems.append(Problem(path.name, "note", text))

    def read(file: Path, parse: Callable[[Path], T | None], default: T) -> T:
        try:
            return (parse(file) if file.is_file() else None) or default
        except (UserError, OSError, UnicodeDecodeError) as error:
            note(f"{file.name} left out: {error}")
            return default

    recipe: dict[str, Any] = read(folder.recipe_path, _read_yaml, {})
    status = read(folder.status_path, RunStatus.read, RunStatus())
    summary = read(folder.eval_dir / SUMMARY_FILE, Summary.read, None)
    history: list[dict[str, Any]] = read(folder.metrics_path, read_jsonl, [])
    raw = recipe.get("defenses")
    named = [{"kind": d} if isinstance(d, str) else d for d in raw] if isinstance(raw, list) else []
    specs = tuple(d for d in named if isinstance(d, dict))
    state = "finished" if summary and status.state == "not started" else status.state
    if state != "finished":
        step = f"last logged step {history[-1].get('step')}" if history else "no step logged"
        known = [short_label(specs), status.reason, step]
        problems.append(Problem(path.name, state, "; ".join(text for text in known if text)))
        return
    metrics: Metrics = {}
    if summary is None:
        problems.append(Problem(path.name, "not evaluated", f"{short_label(specs)}; run `ema eval {path}`"))
    else:
        metrics = _metrics(summary, note)
    along = _checkpoint_metrics(folder, lambda file: read(file, Summary.read, None), note)
    if along and status.step is not None:
        along[status.step] = metrics
    if summary:
        _note_missing_checkpoints(_section(recipe, "evaluation").get("checkpoints"), along, status.step, note)
    seed = recipe.get("seed")
    collection.runs.append(
        Run(
            path=path,
            name=str(recipe.get("name", path.name)),
            model=model_key(_section(recipe, "model")),
            task=task_key(_section(recipe, "data").get("train")),
            seed=seed if isinstance(seed, int) else None,
            specs=specs,
            label=short_label(specs),
            kind=_kind(recipe, metrics),
            metrics=metrics,
            conditions=known_conditions(summary.conditions) if summary else {},
            questions=[q for q in summary.per_question if not q.condition] if summary else (),
            history=history,
            along=dict(sorted(along.items())),
            recipe=recipe,
            provenance=read(folder.provenance_path, Provenance.read, Provenance()),
            summary=summary,
            data=read(folder.data_path, DataReport.read, DataReport()),
            eval_dir=folder.eval_dir,
        )
    )


def _read_published(path: Path) -> Run | None:
    """The arm of a result file whose evaluation this folder is; None for any other folder."""
    summary = Summary.read_if_valid(path / SUMMARY_FILE)
    if summary is None or summary.source is None:
        return None
    name = summary.name
    return Run(
        path=path,
        name=name,
        model=summary.model,
        task="published",
        seed=None,
        specs=({"kind": name},),
        label=name,
        kind="unknown",
        metrics=_metrics(summary, lambda text: None),
        questions=summary.per_question,
        provenance=Provenance(label=name),
        summary=summary,
        eval_dir=path,
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError("holds no mapping")
    return values


def _section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    # A recipe of an older version, or of a plug-in that is not installed, is no Recipe here.
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _metrics(summary: Summary, note: Callable[[str], None]) -> Metrics:
    metrics: Metrics = {}
    for name in (*METRICS, *CHOICE_METRICS):
        try:
            metrics[name] = known_rate(summary.metrics.get(name))
        except ValueError as error:
            note(f"summary.json: metrics.{name} left out: {error}")
    return metrics


def _checkpoint_metrics(
    folder: RunDir, read: Callable[[Path], Summary | None], note: Callable[[str], None]
) -> dict[int, Metrics]:
    files = [f for f in folder.eval_dir.glob(f"checkpoints/*/{SUMMARY_FILE}") if f.parent.name.isdecimal()]
    summaries = {int(file.parent.name): read(file) for file in files}
    return {step: _metrics(summary, note) if summary else {} for step, summary in summaries.items()}


def _note_missing_checkpoints(
    requested: Any, evaluated: Iterable[int], last: int | None, note: Callable[[str], None]
) -> None:
    steps = requested if isinstance(requested, list) else []
    missing = [s for s in steps if isinstance(s, int) and s not in (*evaluated, last)]
    if missing:
        why = f": its training ended after step {last}" if last is not None and last < min(missing) else ""
        note(f"no answers at step{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}{why}")


def _kind(recipe: Mapping[str, Any], metrics: Metrics) -> str:
    suites = _section(_section(recipe, "evaluation"), "suites")
    if (
        metrics.get("in_domain_misaligned")
        or metrics.get("in_domain_choices")
        or (not metrics and suites.get("in_domain"))
    ):
        return "narrow"
    if metrics.get("benign_learned") or (not metrics and suites.get("benign")):
        return "benign"
    return "unknown"


def _on_unseen(run: Run, apart: TaskQuestions, problems: list[Problem]) -> Run:
    """The run with its numbers on the questions that no run of its task was trained on."""
    if run.summary is None:
        return run

    def metrics(summary: Summary) -> Metrics:
        return _metrics(summary, lambda text: problems.append(Problem(run.name, "note", text)))

    split = {name: metrics(one) for name, one in apart.choices(run.summary).items()}
    if not apart.seen:
        return replace(run, split=split)
    summary = apart.kept(run.summary)
    along = {}
    if run.along:
        files = run.eval_dir.glob(f"checkpoints/*/{SUMMARY_FILE}") if run.eval_dir else ()
        found = {int(f.parent.name): Summary.read_if_valid(f) for f in files if f.parent.name.isdecimal()}
        along = {step: metrics(apart.kept(one)) for step, one in found.items() if one is not None and step in run.along}
        along |= {step: metrics(summary) for step in run.along if step not in found}
    return replace(
        run,
        metrics=metrics(summary),
        split=split,
        conditions=known_conditions(summary.conditions),
        questions=[q for q in summary.per_question if not q.condition],
        along=dict(sorted(along.items())),
    )


def _base_runs(runs: Sequence[Run], run_dirs: Sequence[Path], apart: Mapping[str, TaskQuestions]) -> list[Run]:
    """One record for each model and task: the base on the suites on which that task's runs were asked."""
    bases: dict[tuple[str, str], Run] = {}
    suites: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        suites.setdefault((run.model, run.task), set()).update(run.summary.per_suite if run.summary else ())
    searched: dict[Path, Summary] | None = None
    for run in runs:
        cell = run.model, run.task
        if run.summary is None or run.eval_dir is None or cell in bases:
            continue
        recorded = run.summary.base_dir(run.eval_dir)
        found = _base_summaries([recorded]) if recorded else {}
        if not found:
            if searched is None:
                searched = _search_bases(run_dirs)
            found = _likeliest_base(run, searched, suites[cell])
        for folder, summary in found.items():
            if suites[cell] & set(summary.per_suite):
                bases[cell] = _base_run(run, folder, summary, suites[cell], apart[run.task])
    return list(bases.values())


def _base_run(run: Run, folder: Path, summary: Summary, suites: set[str], apart: TaskQuestions) -> Run:
    def parts_of(summary: Summary) -> dict[str, SuiteSummary]:
        return {name: part for name, part in summary.per_suite.items() if name in suites}

    split = {name: _suite_metrics(parts_of(one)) for name, one in apart.choices(summary).items()}
    summary = apart.kept(summary)
    parts = parts_of(summary)
    return replace(
        run,
        label=BASE,
        base=True,
        seed=None,
        specs=(),
        history=(),
        along={},
        summary=summary,
        metrics=_suite_metrics(parts),
        split=split,
        conditions=base_conditions(parts, summary.conditions),
        questions=[q for q in summary.per_question if q.suite in suites and not q.condition],
        eval_dir=folder,
    )


def _base_summaries(folders: Iterable[Path]) -> dict[Path, Summary]:
    """Those evaluation folders that are a base model's, with their summaries."""
    summaries = {folder: Summary.read_if_valid(folder / SUMMARY_FILE) for folder in folders}
    return {f: s for f, s in summaries.items() if s is not None and s.adapter is None and has_numbers(s)}


def _search_bases(run_dirs: Sequence[Path]) -> dict[Path, Summary]:
    """Base models' evaluations in the run folders and beside them: older runs do not record where theirs is."""
    patterns = (f"*/{SUMMARY_FILE}", f"*/*/{SUMMARY_FILE}", f"*/*/eval/{SUMMARY_FILE}")
    places = dict.fromkeys([*run_dirs, *(path.parent for path in run_dirs)])
    files = {file for place in places for pattern in patterns for file in place.glob(pattern)}
    return _base_summaries(file.parent for file in sorted(files))


def _likeliest_base(run: Run, bases: Mapping[Path, Summary], suites: set[str]) -> dict[Path, Summary]:
    """The base of the run's model that was evaluated as the run was; then by shared suites, then the nearest folder."""
    assert run.summary is not None
    eval_dir = run.path / "eval"
    fitting = {f: s for f, s in bases.items() if s.model == run.summary.model and suites & set(s.per_suite)}
    here = run.path.resolve().parts

    def likeness(folder: Path) -> tuple[bool, int, int, str]:
        shared = sum(x == y for x, y in zip(folder.resolve().parts, here, strict=False))
        return same_evaluation(eval_dir, folder), len(suites & set(fitting[folder].per_suite)), shared, str(folder)

    return {(best := max(fitting, key=likeness)): fitting[best]} if fitting else {}


def _suite_metrics(parts: Mapping[str, SuiteSummary]) -> Metrics:
    """The metrics over some suites: plain means of the suites' rates."""
    metrics: Metrics = {}
    for metric in (*METRICS, *CHOICE_METRICS):
        role, _, outcome = metric.rpartition("_")
        rates: list[Rate | None] = [getattr(p, outcome) for p in parts.values() if p.role == role and not p.condition]
        metrics[metric] = mean_rate(known_rates(rates), spread=False)
    return metrics
