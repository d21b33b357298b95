"""What is left to do of a study, by the contents of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ema_scale.core.run_dir import STUDY, RunDir
from ema_scale.evaluation.runs import is_evaluated
from ema_scale.recipe import Recipe
from ema_scale.report.records import PAGE
from ema_scale.study.find import find_study
from ema_scale.study.grid import Study
from ema_scale.training.resume_check import is_finished


@dataclass(frozen=True)
class Todo:
    """train: indices of the runs that are not finished. evaluate, report: whether that is to be done."""

    train: tuple[int, ...]
    evaluate: bool
    report: bool

    @property
    def nothing(self) -> bool:
        return not (self.train or self.evaluate or self.report)


def todo(study: Study, recipes: Sequence[Recipe]) -> Todo:
    """recipes: the study's runs, in order. Loads no model; a study of which nothing is trained is quick.

    A finished run is recognised by its recipe and its data, an evaluation by its answers and judgements, a report by
    being newer than all of that.
    """
    train = tuple(i for i, r in enumerate(recipes) if not is_finished(r, RunDir(r.run_path)))
    if train or not is_evaluated(recipes, study.path / "base"):
        return Todo(train, True, True)
    return Todo((), False, not _is_reported(study, recipes))


def _is_reported(study: Study, recipes: Sequence[Recipe]) -> bool:
    page = study.path / "report" / PAGE
    runs = [RunDir(r.run_path) for r in recipes]
    sources = [study.path / STUDY, *study.path.glob("base*/eval/summary.json")]
    sources += [path for run in runs for path in (run.status_path, run.eval_dir / "summary.json")]
    if not page.exists() or find_study(study.path) != study:
        return False
    return page.stat().st_mtime >= max(path.stat().st_mtime for path in sources if path.exists())
