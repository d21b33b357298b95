"""Which runs are in no mean, and which means cover less than others: each is said, for a mean does not show it."""

from __future__ import annotations

from collections.abc import Sequence

from ema_scale.study.report.records import Collection, Problem, Run

_ROLES = {"general_misaligned": "general", "in_domain_misaligned": "in-domain"}


def gaps(found: Collection) -> list[Problem]:
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
