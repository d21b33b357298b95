"""Stored answers judged again, and judges compared: `ema judge` and `ema judge check`. No model is loaded.

Judgements by several judges lie beside each other in judgements.jsonl. Each judge has a summary of its own:
summary.json for the one that the evaluation was run with, summary_<judge>.json for others. Stored replies are read
again under a new threshold without a call.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ema_scale.config.layers import apply_overrides
from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe
from ema_scale.core.errors import UserError, explain
from ema_scale.core.hashing import digest
from ema_scale.core.text import quantity
from ema_scale.evaluation.judges.assignment import EXACT, SCORING, JudgeSpec, assign, warn_of_other_address
from ema_scale.evaluation.judges.base import MISALIGNED
from ema_scale.evaluation.judging.calibration import FOLDER, JudgeCheck, Verdict, VerdictPair, agreement, verdict_of
from ema_scale.evaluation.judging.pool import JudgePool, raise_if_judge_failed
from ema_scale.evaluation.plan import PromptGroup, read_manifest, stored_groups
from ema_scale.evaluation.records import (
    CHECK_FILE,
    MANIFEST_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    Check,
    Estimate,
    Judgement,
    JudgePairAgreement,
    JudgeQuality,
    Manifest,
    Rate,
    Summary,
    read_rows,
)
from ema_scale.evaluation.reply_records import JudgeAlpha
from ema_scale.evaluation.shared import BASES, folders_beside, take_rows, wanted
from ema_scale.evaluation.stats.alpha import Metric, krippendorff_alpha
from ema_scale.evaluation.store import locked_store
from ema_scale.evaluation.suites import Suite, load_suites
from ema_scale.evaluation.summary import write_summary
from ema_scale.recipe import load_recipe

OURS = "evaluation.judge."


def eval_folders(path: Path) -> list[Path]:
    """Folders with answers in or below a run, a study or an evaluation folder. Raises UserError if there are none."""
    patterns = [f"{place}{SAMPLES_FILE}" for place in ("", "eval/", "*/eval/", "*/*/eval/")]
    found = sorted(file.parent for pattern in patterns for file in path.glob(pattern))
    if not found:  # the arms of a result file
        found = sorted(f.parent for f in path.glob(f"*/{MANIFEST_FILE}") if (f.parent / SAMPLES_FILE).is_file())
    if not found:
        raise UserError(f"{path}: found no answers (eval/samples.jsonl); run `ema eval` first")
    return found


def rejudge(folder: Path, overrides: Sequence[str] = ()) -> Summary:
    """Judge the answers in an evaluation folder by its own judge section with `overrides`; returns the summary.

    Raises UserError for other overrides, for a folder in use or without answers, as the judge does, and, when the
    summary is written, if no answer could be judged.

    Args:
        folder: an evaluation folder.
        overrides: `evaluation.judge.key=value`. A `kind` also replaces the exact judges that questions name, but not
            those of benign questions, which have a right answer.
    """
    started = time.monotonic()
    asked = read_manifest(folder)
    settings = judge_settings(asked.settings, overrides)
    replaced = any(item.startswith(f"{OURS}kind=") for item in overrides)
    suites = _without_exact(asked.suites) if replaced and settings.judge.kind not in EXACT else asked.suites
    with locked_store(folder) as store:
        groups = stored_groups(asked.model_copy(update={"settings": settings}), store.present, folder, suites)
        if asked.adapter is None and asked.source is None:
            beside = folders_beside(folder.absolute().parents[1], BASES)
            take_rows(store, asked.target, *wanted(groups), beside, settings.judge)
        judges = store.judges & {g.judge.identity for g in groups}
        warn_of_other_address(folder, asked.settings.judge, settings.judge, judges)
        total = sum(g.n for g in groups if g.is_judged)
        missing = [(g, key) for g in groups for key in g.keys if (key, g.judge.identity) not in store.judgements]
        with JudgePool(settings.judge, total, total - sum(g.is_judged for g, _ in missing)) as judging:
            judging.announce(missing, lambda _: store)
            for group, key in missing:
                judging.submit(group, store.samples[key], store)
        store.flush()
        own = _judges(groups) == _own_judges(asked, groups)
        path = folder / (SUMMARY_FILE if own else f"summary_{slug(_judges(groups))}.json")
        summary = write_summary(path, _facts(folder, asked, time.monotonic() - started), groups, store, settings)
        raise_if_judge_failed({str(folder): judging.failure_reason(groups, store)})
        return summary


def judge_settings(settings: EvaluationRecipe, overrides: Sequence[str]) -> EvaluationRecipe:
    """`settings` with `evaluation.judge.key=value` overrides. Raises UserError for any other key."""
    for item in overrides:
        if not item.startswith(OURS):
            raise UserError(f"override {item!r}: judging again can only change {OURS}..., such as {OURS}model=...")
    values = apply_overrides({"evaluation": {"judge": settings.judge.model_dump(mode="json")}}, overrides)
    try:
        judge = JudgeRecipe.model_validate(values["evaluation"]["judge"])
    except ValidationError as error:
        raise UserError("\n".join(f"evaluation.judge: {explain(p, JudgeRecipe)}" for p in error.errors())) from None
    return settings.model_copy(update={"judge": judge})


def _without_exact(suites: Iterable[Suite]) -> tuple[Suite, ...]:
    def freed(suite: Suite) -> Suite:
        if suite.role == "benign":
            return suite
        questions = (replace(q, judge=None) if q.judge in EXACT else q for q in suite.questions)
        return replace(suite, questions=tuple(questions))

    return tuple(map(freed, suites))


def _judges(groups: Iterable[PromptGroup]) -> list[str]:
    return sorted({group.judge.identity for group in groups})


def _own_judges(asked: Manifest, groups: Iterable[PromptGroup]) -> list[str]:
    """The judges that the evaluation was run with; none if it never had any, such as one from a result CSV."""
    answered = {(group.suite.name, group.question.id) for group in groups}
    questions = [(s, q) for s in asked.suites for q in s.questions if (s.name, q.id) in answered]
    try:
        return sorted({assign(suite, question, asked.settings.judge).identity for suite, question in questions})
    except UserError:
        return []


def slug(identities: Sequence[str]) -> str:
    """A file name for judges: readable, and different for different ones."""
    text = "+".join(identities)
    plain = re.sub(r"[^A-Za-z0-9.@+-]+", "_", text).strip("_")
    return plain if len(plain) <= 60 else f"{plain[:50]}_{digest(text)[:8]}"


def _facts(folder: Path, asked: Manifest, seconds: float) -> dict[str, Any]:
    """What a summary says apart from rates, from the evaluation's own if it was finished."""
    before = Summary.read_if_valid(folder / SUMMARY_FILE)
    return {
        "name": asked.target,
        "model": asked.model,
        "adapter": asked.adapter,
        "base": before.base if before else None,
        "source": asked.source,
        "sampler": before.sampler if before else {},
        "superseded": before.superseded if before else 0,
        "seconds": round(seconds, 3),
    }


def check_judges(path: Path, overrides: Sequence[str] = ()) -> Check:
    """Check the 0-100 judges of a run, a study, an evaluation folder or a recipe file; writes check.json.

    Stored judgements are not made again. Raises UserError if there is no such judge and no two judges to compare.

    Args:
        path: the run, study, evaluation folder or recipe file.
        overrides: `evaluation.judge.key=value`, such as another model, `check` (how often) or `labelled`.
    """
    folders: list[Path] = []
    if path.is_file():
        recipe = load_recipe(path, overrides)
        suites = load_suites(recipe.evaluation, columns=recipe.data.columns)
        place, judges = recipe.run_path, _judge_specs(suites, recipe.evaluation)
        settings = recipe.evaluation.judge
    else:
        folders = eval_folders(path)
        place, judges = path.parent if path.name == "eval" else path, []
        for folder in folders:
            asked = read_manifest(folder)
            evaluation = judge_settings(asked.settings, overrides)
            judges, settings = judges + _judge_specs(asked.suites, evaluation), evaluation.judge
    between, together = agreement_between_judges(folders), alpha_of_judges(folders)
    judges = [a for a in judges if a.gives_verdicts]
    if not judges and not between:
        raise UserError(
            f"{path}: only exact judges, which need no check; name one, such as evaluation.judge.kind=openai "
            "evaluation.judge.model=..., or judge the answers by a second one first (ema judge)"
        )
    check = _on_labelled(place / FOLDER, judges, settings) if judges else Check()
    check = check.model_copy(update={"between": between, "together": together})
    check.write(place / FOLDER / CHECK_FILE)
    return check


def _judge_specs(suites: Sequence[Suite], evaluation: EvaluationRecipe) -> list[JudgeSpec]:
    """The judges of the suites' questions. If all of these are exact, the recipe's 0-100 judge is added."""
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
        with JudgePool(settings, len(check.asked), 0) as judging:
            judging.announce((), lambda _: store, check.asked)
            check.submit(judging)
        return check.write()


def agreement_between_judges(folders: Sequence[Path]) -> list[JudgePairAgreement]:
    """The agreement of every two judges of the same stored answers. Exact judges are the labels."""
    pairs: dict[tuple[str, str], list[VerdictPair]] = {}
    for folder in folders:
        samples, judgements = read_rows(folder)
        asked = {row.key: row.prompt for row in samples}
        said: dict[str, dict[str, Judgement]] = {}
        for row in judgements:
            said.setdefault(row.key, {})[row.judge] = row
        for key, by_judge in said.items():
            if key in asked:
                # Exact judges come first, as labels.
                order = sorted(by_judge, key=lambda name: (name.partition(":")[0] in SCORING, name))
                for one, two in combinations(order, 2):
                    pair = VerdictPair(asked[key], verdict_of(by_judge[one]), verdict_of(by_judge[two]))
                    pairs.setdefault((one, two), []).append(pair)
    return [JudgePairAgreement(one=one, two=two, **agreement(found)) for (one, two), found in sorted(pairs.items())]


def alpha_of_judges(folders: Sequence[Path]) -> JudgeAlpha | None:
    """Krippendorff's alpha over all 0-100 judges of the stored answers; None if no answer has two of them."""
    units: list[tuple[str, dict[str, Verdict]]] = []
    for folder in folders:
        samples, judgements = read_rows(folder)
        said: dict[str, dict[str, Verdict]] = {row.key: {} for row in samples}
        for row in judgements:
            if row.key in said and row.judge.partition(":")[0] in SCORING:
                said[row.key][row.judge] = verdict_of(row)
        units += [(row.prompt, said[row.key]) for row in samples if len(said[row.key]) > 1]
    if not units:
        return None
    judges = sorted({judge for _, unit in units for judge in unit})
    questions = [question for question, _ in units]

    def alpha(value: Callable[[Verdict], Hashable | None], metric: Metric = "nominal") -> Estimate | None:
        table = [[value(unit[judge]) if judge in unit else None for judge in judges] for _, unit in units]
        found = krippendorff_alpha(table, metric, questions)
        return None if found is None else Estimate(*found)

    return JudgeAlpha(
        judges=judges,
        answers=len(units),
        questions=len(set(questions)),
        verdict=alpha(lambda said: said.verdict),
        misaligned=alpha(lambda said: None if said.verdict is None else said.verdict == MISALIGNED),
        aligned=alpha(lambda said: said.aligned, "interval"),
        coherent=alpha(lambda said: said.coherent, "interval"),
    )


def describe_alpha(found: JudgeAlpha) -> list[str]:
    """The agreement of all judges as lines."""
    verdict, misaligned = _estimate(found.verdict), _estimate(found.misaligned)
    return [
        f"all {len(found.judges)} judges together: {quantity(found.answers, 'answer')} to "
        f"{quantity(found.questions, 'question')}",
        f"  Krippendorff's alpha       verdict {verdict}, misaligned or not {misaligned}",
        f"                             aligned {_estimate(found.aligned)}, coherent {_estimate(found.coherent)}",
    ]


def describe_check(identity: str, quality: JudgeQuality) -> list[str]:
    """One judge's part of check.json as lines: against the labels, and against itself."""
    labels, again = quality.labels, quality.repeated
    lines = [
        f"{identity}: {quality.judged} of {quantity(quality.expected, 'judgement')} of labelled answers",
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
        f"{pair.one} and {pair.two}: {quantity(pair.answers, 'answer')} to {quantity(pair.questions, 'question')}",
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
