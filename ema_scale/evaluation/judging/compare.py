"""`ema judge check`: a judge against labelled answers, against itself, and against other judges of the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.assignment import SCORING, JudgeSpec, assign
from ema_scale.evaluation.judging.calibration import FOLDER, JudgeCheck, VerdictPair, agreement, verdict_of
from ema_scale.evaluation.judging.pool import JudgePool
from ema_scale.evaluation.judging.rejudge import eval_folders, judge_settings
from ema_scale.evaluation.manifest import read_manifest
from ema_scale.evaluation.records import (
    CHECK_FILE,
    Check,
    Estimate,
    Judgement,
    JudgePairAgreement,
    JudgeQuality,
    Rate,
    read_rows,
)
from ema_scale.evaluation.store import locked_store
from ema_scale.evaluation.suites import Suite, load_suites
from ema_scale.recipe import load_recipe


def check_judges(path: Path, overrides: Sequence[str] = ()) -> Check:
    """Check the 0-100 judges of a run, a study, an evaluation folder or a recipe file; returns check.json.

    overrides: `evaluation.judge.key=value`, such as another model, `check` (how often) or `labelled`. Judgements that
    are there already are not made again. Raises UserError if there is no such judge and no two judges to compare.
    """
    folders: list[Path] = []
    if path.is_file():
        recipe = load_recipe(path, overrides)
        place, judges = recipe.run_path, _assignments(load_suites(recipe.evaluation), recipe.evaluation)
        settings = recipe.evaluation.judge
    else:
        folders = eval_folders(path)
        place, judges = path.parent if path.name == "eval" else path, []
        for folder in folders:
            asked = read_manifest(folder)
            evaluation = judge_settings(asked.settings, overrides)
            judges, settings = judges + _assignments(asked.suites, evaluation), evaluation.judge
    between = agreement_between_judges(folders)
    judges = [a for a in judges if a.kind in SCORING]
    if not judges and not between:
        raise UserError(
            f"{path}: only exact judges, which need no check; name one, such as evaluation.judge.kind=openai "
            "evaluation.judge.model=..., or judge the answers by a second one first (ema judge)"
        )
    check = _on_labelled(place / FOLDER, judges, settings) if judges else Check()
    check = check.model_copy(update={"between": between})
    check.write(place / FOLDER / CHECK_FILE)
    return check


def _assignments(suites: Sequence[Suite], evaluation: EvaluationRecipe) -> list[JudgeSpec]:
    """The judges of the suites' questions; for questions with an exact judge, the recipe's own if it is none."""
    found = [assign(suite, question, evaluation.judge) for suite in suites for question in suite.questions]
    if evaluation.judge.kind in SCORING and not any(a.kind in SCORING for a in found):
        from ema_scale.evaluation.suites import Question

        anything = Question("labelled", ("labelled answers",))
        found.append(assign(Suite("labelled", "general", (anything,)), anything, evaluation.judge))
    return found


def _on_labelled(folder: Path, judges: Sequence[JudgeSpec], settings: JudgeRecipe) -> Check:
    settings = settings if settings.check else settings.model_copy(update={"check": 1})
    with locked_store(folder) as store:
        check = JudgeCheck(folder, store, judges, settings)
        with JudgePool(settings, check.missing, 0) as judging:
            check.submit(judging)
        return check.write()


def agreement_between_judges(folders: Sequence[Path]) -> list[JudgePairAgreement]:
    """Every two judges that judged the same stored answers: how far they agree. Exact judges are labels."""
    pairs: dict[tuple[str, str], list[VerdictPair]] = {}
    for folder in folders:
        samples, judgements = read_rows(folder)
        asked = {row.key: row.prompt for row in samples}
        said: dict[str, dict[str, Judgement]] = {}
        for row in judgements:
            said.setdefault(row.key, {})[row.judge] = row
        for key, by_judge in said.items():
            if key in asked:
                # Exact judges first: they are the truth that others are held to.
                order = sorted(by_judge, key=lambda name: (name.partition(":")[0] in SCORING, name))
                for one, two in combinations(order, 2):
                    pair = VerdictPair(asked[key], verdict_of(by_judge[one]), verdict_of(by_judge[two]))
                    pairs.setdefault((one, two), []).append(pair)
    return [JudgePairAgreement(one=one, two=two, **agreement(found)) for (one, two), found in sorted(pairs.items())]


def describe_check(identity: str, quality: JudgeQuality) -> list[str]:
    """One judge's part of check.json as lines: against the labels, and against itself."""
    labels, again = quality.labels, quality.repeated
    lines = [
        f"{identity}: {quality.judged} of {quality.expected} judgements of labelled answers",
        f"  same verdict as the label  {_rate(labels.same)}, kappa {_estimate(labels.kappa)}",
        f"  misaligned ones found      {_rate(quality.misaligned_found)}",
        f"  false alarms               {_rate(quality.false_alarms)}",
    ]
    if again.answers:
        points = "" if again.score_change is None else f", aligned score {again.score_change:.1f} points apart"
        lines.append(
            f"  the same when asked again  {_rate(again.same)}, kappa {_estimate(again.kappa)}, rank correlation "
            f"{_estimate(again.correlation_aligned)}{points}"
        )
    return lines


def describe_agreement(pair: JudgePairAgreement) -> list[str]:
    """Two judges' agreement as lines."""
    return [
        f"{pair.one} and {pair.two}: {pair.answers} answers to {pair.questions} questions",
        f"  same verdict               {_rate(pair.same)}, kappa {_estimate(pair.kappa)}",
        f"  misaligned or not          kappa {_estimate(pair.kappa_misaligned)}",
        f"  rank correlation           aligned {_estimate(pair.correlation_aligned)}, coherent "
        f"{_estimate(pair.correlation_coherent)}",
    ]


def _rate(rate: Rate | None) -> str:
    if rate is None or rate.rate is None or rate.low is None or rate.high is None:
        return "-"
    return f"{100 * rate.rate:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f})"


def _estimate(found: Estimate | None) -> str:
    return "-" if found is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
