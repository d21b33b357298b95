"""Run folders -> records. A missing or broken file becomes a note in the report, not a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.names import model_key, task_key
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation.runs import same_evaluation
from ema_scale.report.aggregate import mean_rate
from ema_scale.report.conditional import asked_under, base_conditions
from ema_scale.report.display_names import BASE, distinct_labels, model_names, short_label, spec_key, task_names
from ema_scale.report.records import METRICS, Collection, Problem, QuestionRate, ReportedRate, Run
from ema_scale.report.run_details import missing_runs


def collect(run_dirs: Sequence[Path]) -> Collection:
    """Read every run folder, and the base model's evaluation wherever it lies beside or inside them.

    A folder that does not exist is listed as not started. Raises UserError if none is a run folder.
    """
    found = Collection(asked=len(run_dirs))
    run_dirs = [Path(p) for p in run_dirs]
    base_files = _base_summaries(run_dirs)
    any_run = False
    for path in run_dirs:
        if not path.is_dir():
            found.problems.append(Problem(path.name, "not started", f"no folder at {path}"))
        elif not RunDir(path).recipe_path.is_file() and not RunDir(path).status_path.is_file():
            if (path / "slurm").is_dir():
                found.problems.append(Problem(path.name, "not started", f"see its job's log: ema logs {path}"))
            elif path not in (summary.parent.parent for summary in base_files):
                found.problems.append(Problem(path.name, "note", "no recipe.yaml: not a run folder, left out"))
        else:
            any_run = True
            _read_run(path, found)
    if not any_run:
        asked = ", ".join(str(p) for p in run_dirs) or "no folder at all"
        raise UserError(f"report: found no run folder among {asked}; expected folders with a recipe.yaml")
    labels = distinct_labels(run.specs for run in found.runs)
    models, tasks = model_names(run.model for run in found.runs), task_names(run.task for run in found.runs)
    found.runs = [
        replace(run, model=models[run.model], task=tasks[run.task], label=labels[spec_key(run.specs)])
        for run in found.runs
    ]
    found.bases = _base_runs(found.runs, base_files)
    found.problems += missing_runs(found)
    return found


def _read_run(path: Path, found: Collection) -> None:
    """Add the run to `found.runs` if it counts, else a line to `found.problems`."""
    folder = RunDir(path)
    problems: list[Problem] = []
    recipe = _mapping(folder.recipe_path, problems, path.name, yaml.safe_load, yaml.YAMLError)
    status = _json(folder.status_path, problems, path.name)
    summary = _json(folder.eval_dir / "summary.json", problems, path.name)
    history = _rows(folder.metrics_path, problems, path.name)
    found.problems += problems
    raw = recipe.get("defenses") or []
    named = [{"kind": d} if isinstance(d, str) else d for d in raw] if isinstance(raw, list) else []
    specs = tuple(d for d in named if isinstance(d, dict))
    state = str(status.get("state", "finished" if summary else "not started"))
    if state != "finished":
        why = next((str(status[k]) for k in ("error", "reason", "message") if status.get(k)), "")
        step = f"last logged step {history[-1].get('step')}" if history else "no step logged"
        found.problems.append(Problem(path.name, state, "; ".join(filter(None, (short_label(specs), why, step)))))
        return
    if not summary:
        found.problems.append(Problem(path.name, "not evaluated", f"{short_label(specs)}; run `ema eval {path}`"))
    metrics = _rates(summary.get("metrics"), path.name, found.problems)
    last = status.get("step")
    steps = _along(folder, last, metrics, found.problems)
    asked = _section(recipe, "evaluation").get("checkpoints") if summary else None
    missing = [s for s in asked if isinstance(s, int) and s not in (*steps, last)] if isinstance(asked, list) else []
    if missing:
        why = f": its training ended after step {last}" if isinstance(last, int) and last < min(missing) else ""
        told = f"step{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        found.problems.append(Problem(path.name, "note", f"no answers at {told}{why}"))
    seed = recipe.get("seed")
    found.runs.append(
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
            conditions=asked_under(summary.get("conditions"), read_rate),
            questions=_questions(summary),
            history=history,
            along=steps,
            recipe=recipe,
            provenance=_json(folder.provenance_path, found.problems, path.name),
            summary=summary,
            data=_json(folder.data_path, found.problems, path.name),
            eval_dir=folder.eval_dir,
        )
    )


def _along(
    folder: RunDir, last: Any, metrics: Mapping[str, ReportedRate | None], problems: list[Problem]
) -> dict[int, Mapping[str, ReportedRate | None]]:
    found: dict[int, Mapping[str, ReportedRate | None]] = {}
    for file in folder.eval_dir.glob("checkpoints/*/summary.json"):
        if file.parent.name.isdigit():
            summary = _json(file, problems, folder.path.name)
            found[int(file.parent.name)] = _rates(summary.get("metrics"), folder.path.name, problems)
    if found and isinstance(last, int):
        found[last] = metrics
    return dict(sorted(found.items()))


def _kind(recipe: Mapping[str, Any], metrics: Mapping[str, ReportedRate | None]) -> str:
    suites = _section(_section(recipe, "evaluation"), "suites")
    if metrics.get("in_domain_misaligned") or (not metrics and suites.get("in_domain")):
        return "narrow"
    if metrics.get("benign_learned") or (not metrics and suites.get("benign")):
        return "benign"
    return "unknown"


def _section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _mapping(path: Path, problems: list[Problem], run: str, parse: Any, error: type[Exception]) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, error) as reason:
        problems.append(Problem(run, "note", f"{path.name} cannot be read ({reason}); left out"))
        return {}
    if isinstance(value, dict):
        return value
    problems.append(Problem(run, "note", f"{path.name} holds no mapping; left out"))
    return {}


def _json(path: Path, problems: list[Problem], run: str) -> dict[str, Any]:
    return _mapping(path, problems, run, json.loads, ValueError)


def _rows(path: Path, problems: list[Problem], run: str) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except (UserError, OSError) as reason:
        problems.append(Problem(run, "note", f"{path.name} left out: {reason}"))
        return []


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def read_rate(value: Any) -> ReportedRate | None:
    """A Rate from a metric of summary.json, or None from null. Raises ValueError if it is neither."""
    if value is None:
        return None
    rate, low, high = (_number(value.get(k)) if isinstance(value, dict) else None for k in ("rate", "low", "high"))
    if rate is None and isinstance(value, dict) and not value.get("n"):
        return None
    if rate is None or low is None or high is None or not 0 <= low <= rate <= high <= 1:
        raise ValueError(f"found {value!r}, expected 0 <= low <= rate <= high <= 1")
    counts = (int(_number(value.get(k)) or 0) for k in ("n", "questions", "dropped"))
    return ReportedRate(rate, low, high, *counts)


def _rates(values: Any, run: str, problems: list[Problem]) -> dict[str, ReportedRate | None]:
    rates: dict[str, ReportedRate | None] = {}
    for name in METRICS if isinstance(values, dict) else ():
        try:
            rates[name] = read_rate(values.get(name))
        except ValueError as error:
            problems.append(Problem(run, "note", f"summary.json: metrics.{name} left out: {error}"))
    return rates


def _questions(summary: Mapping[str, Any]) -> list[QuestionRate]:
    rows = summary.get("per_question")
    questions = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and not row.get("condition"):
            suite, role, name, text = (str(row.get(k, "")) for k in ("suite", "role", "id", "text"))
            bad, muddled, right = (_share(row.get(k)) for k in ("misaligned", "incoherent", "correct"))
            counted = int((_number(row.get("n")) or 0) - (_number(row.get("dropped")) or 0))
            questions.append(QuestionRate(suite, role, name, text, bad, muddled, right, max(0, counted)))
    return questions


def _share(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 <= number <= 1 else None


def _base_summaries(run_dirs: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Evaluations without an adapter, in the run folders or beside them: recognised by `"adapter": null`."""
    inside = ("eval/summary.json", "eval/*/summary.json", "*/eval/summary.json")
    beside = ("*/summary.json", "*/eval/summary.json", "*/*/eval/summary.json")
    files = {file for path in run_dirs for pattern in inside for file in path.glob(pattern)}
    files |= {file for parent in {p.parent for p in run_dirs} for pattern in beside for file in parent.glob(pattern)}
    found = {}
    for file in sorted(files):
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(summary, dict) and summary.get("metrics") and summary.get("adapter", ...) is None:
            found[file] = summary
    return found


def _base_runs(runs: Sequence[Run], files: Mapping[Path, Mapping[str, Any]]) -> list[Run]:
    """One record for each model and task: the base on the suites on which that task's runs were asked."""
    bases: dict[tuple[str, str], Run] = {}
    asked: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        asked.setdefault((run.model, run.task), set()).update(_section(run.summary, "per_suite"))
    for run in runs:
        suites = asked[run.model, run.task]
        same = [(f, s) for f, s in files.items() if run.summary and s.get("model") == run.summary.get("model")]
        fitting = [(f, s) for f, s in same if suites & set(_section(s, "per_suite"))]
        if not fitting or (run.model, run.task) in bases:
            continue
        # The base that was asked as the run was, then that which shares most suites, and of those the nearest folder.
        file, summary = max(
            fitting,
            key=lambda fs: (
                run.eval_dir is not None and same_evaluation(run.eval_dir, fs[0].parent),
                len(suites & set(fs[1]["per_suite"])),
                _shared_parts(fs[0], run.path),
                str(fs[0]),
            ),
        )
        parts = {name: part for name, part in summary["per_suite"].items() if name in suites}
        bases[run.model, run.task] = replace(
            run,
            label=BASE,
            base=True,
            seed=None,
            specs=(),
            history=(),
            along={},
            summary=summary,
            metrics=_suite_metrics(parts),
            conditions=base_conditions(parts, summary.get("conditions"), read_rate),
            questions=[q for q in _questions(summary) if q.suite in suites],
            eval_dir=file.parent,
        )
    return list(bases.values())


def _shared_parts(a: Path, b: Path) -> int:
    return sum(1 for x, y in zip(a.resolve().parts, b.resolve().parts, strict=False) if x == y)


def _suite_metrics(parts: Mapping[str, Any]) -> dict[str, ReportedRate | None]:
    metrics: dict[str, ReportedRate | None] = {}
    for metric in METRICS:
        role, _, outcome = metric.rpartition("_")
        rates = []
        for part in parts.values():
            if isinstance(part, dict) and part.get("role") == role and not part.get("condition"):
                try:
                    rates.append(read_rate(part.get(outcome)))
                except ValueError:
                    continue
        metrics[metric] = mean_rate([r for r in rates if r], spread=False)
    return metrics
