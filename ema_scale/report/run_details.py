"""What was run: models, tasks, versions, judge, counts; and the settings in which averaged runs differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ema_scale.report.judges import judge_quality
from ema_scale.report.records import Collection, Problem, Run

# These differ between runs by design, or are shown elsewhere.
_BY_DESIGN = ("name", "seed", "output", "defenses", "data.train", "evaluation.suites", "model.path")


def run_details(found: Collection) -> list[tuple[str, list[str]]]:
    """(heading, values) pairs; a heading without values is left out."""
    runs = found.runs
    evaluated = [run for run in runs if run.summary]
    every = [*evaluated, *_distinct_bases(found)]
    rows = [
        ("Models", found.models),
        ("Narrow tasks", _tasks(runs, "narrow")),
        ("Benign tasks", _tasks(runs, "benign")),
        ("Tasks without questions of their own", _tasks(runs, "unknown")),
        ("Defenses", list(dict.fromkeys(run.label for run in runs))),
        ("Seeds", sorted({str(run.seed) for run in runs if run.seed is not None}, key=int)),
        ("Runs", [f"{len(evaluated)} evaluated of {found.requested} asked for"]),
        ("Samples", [_samples(every)] if every else []),
        ("Left out of the rates", dropped(every) if every else []),
        ("Training rows left out", training_drops(runs)),
        ("Questions that training rows ask", [f"{task}: {text}" for task, text in found.seen.items()]),
        (
            "Reference gate",
            _unique(gate.text for run in _distinct_bases(found) if run.summary and (gate := run.summary.gate)),
        ),
        ("Judge", _unique(run.summary.judge for run in every if run.summary)),
        ("Judge quality", judge_quality(every)),
        ("Sampler", _unique(_plain(run.summary.sampler) for run in every if run.summary)),
        ("Versions", _unique(_versions(run) for run in runs)),
        ("Code", _unique((run.provenance.git_commit or "")[:12] for run in runs)),
        ("Differing settings averaged over", differing([run.recipe for run in runs])),
    ]
    return [(name, values) for name, values in rows if values]


def dropped(runs: Sequence[Run]) -> list[str]:
    """Dropped rows by reason, most frequent first."""
    reasons: Counter[str] = Counter()
    for run in runs:
        reasons.update(run.summary.dropped if run.summary else {})
    return [f"{reason}: {count:,}" for reason, count in reasons.most_common() if count] or ["no row"]


def training_drops(runs: Sequence[Run]) -> list[str]:
    """How many training rows each run left out."""
    return [f"{run.name}: {count:,}" for run in runs if (count := len(run.data.dropped))]


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """`training.learning_rate (0.0001, 1e-05)` for each setting that is not the same in all recipes."""
    flat = [dict(_flatten(recipe)) for recipe in recipes]
    lines = []
    for key in dict.fromkeys(key for one in flat for key in one):
        if key.startswith(_BY_DESIGN):
            continue
        values = list(dict.fromkeys(_plain(one.get(key, "default")) for one in flat))
        if len(values) > 1:
            lines.append(f"{key} ({', '.join(values)})")
    return lines


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in _BY_DESIGN:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> str:
    """A value of a summary as a person writes it; mappings become `key value, key value`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v not in (None, "", {}, []))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _unique(values: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(v for v in values if v))


def _tasks(runs: Sequence[Run], kind: str) -> list[str]:
    return sorted({run.task for run in runs if run.kind == kind})


def _distinct_bases(found: Collection) -> list[Run]:
    return list({run.eval_dir: run for run in found.bases}.values())


def _samples(runs: Sequence[Run]) -> str:
    total = sum(run.summary.samples for run in runs if run.summary)
    return f"{total:,} answers in all, the base’s included"


def _versions(run: Run) -> str:
    listed = {"python": run.provenance.python, **run.provenance.packages}
    return ", ".join(f"{name} {version}" for name, version in listed.items() if version)


_ROLES = {"general_misaligned": "general", "in_domain_misaligned": "in-domain"}


def missing_runs(found: Collection) -> list[Problem]:
    """A note for each hole in the grid of defenses and tasks, and for each evaluated run that a mean leaves out."""
    notes = []
    for model in found.models:
        runs = [run for run in found.runs if run.model == model and run.metrics]
        notes += [*_holes(runs), *_left_out(runs, f" of {model}" if len(found.models) > 1 else "")]
    if not found.bases:
        notes.append(Problem("base", "note", "no evaluation of the base model found: no dashed line"))
    return notes


def _holes(runs: Sequence[Run]) -> list[Problem]:
    notes = []
    tasks = {run.task for run in runs}
    for label in dict.fromkeys(run.label for run in runs):
        missing = sorted(tasks - {run.task for run in runs if run.label == label})
        if missing:
            text = f"no evaluated run on {', '.join(missing)}: its means cover fewer tasks than the others'"
            notes.append(Problem(label, "note", text))
    cells = [(run.task, run.label, run.seed) for run in runs]
    for task, label, seed in dict.fromkeys(c for c in cells if cells.count(c) > 1):
        notes.append(Problem(label, "note", f"several runs on {task} with seed {seed}: all are averaged"))
    return notes


def _left_out(runs: Sequence[Run], of: str) -> list[Problem]:
    notes = []
    teaching = [run for run in runs if run.teaches]
    benign = [run for run in runs if not run.teaches and any(run.metrics.get(metric) for metric in _ROLES)]
    if teaching and benign:
        text = "their general answers are in no mean, for they were asked benign questions and none in a domain"
        notes.append(Problem(f"Runs{of} on {_named(benign, runs)}", "note", text))
    for metric, role in _ROLES.items():
        without = [run for run in teaching if not run.metrics.get(metric)]
        if without and len(without) < len(teaching):
            text = f"no {role} numbers, so that the means of those are over the other runs alone"
            notes.append(Problem(f"Runs{of} on {_named(without, runs)}", "note", text))
    return notes


def _named(some: Sequence[Run], runs: Sequence[Run]) -> str:
    """Tasks of which all runs are among `some`, and the names of the others."""
    whole = {run.task for run in some} - {run.task for run in runs if run not in some}
    return ", ".join(dict.fromkeys(run.task if run.task in whole else f"{run.task} ({run.name})" for run in some))
