"""What an evaluation would ask, of whom, how often and by which judge, and what is there already (`--dry-run`)."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from ema_scale.config.sections import EvaluationRecipe, ModelRecipe
from ema_scale.core.text import quantity
from ema_scale.core.uri import locate
from ema_scale.evaluation.judges.assignment import SCORING
from ema_scale.evaluation.judges.openai import missing_judge_key
from ema_scale.evaluation.judging.calibration import FOLDER as CHECK
from ema_scale.evaluation.judging.calibration import labelled_path, load_labelled, unjudged
from ema_scale.evaluation.judging.cost import asked_of, estimate, place_of
from ema_scale.evaluation.plan import (
    EvalTarget,
    PromptGroup,
    as_stored,
    check_targets,
    count_answers,
    judged_by_bank,
    plan_prompts,
)
from ema_scale.evaluation.records import JUDGEMENTS_FILE, Judgement, Sample
from ema_scale.evaluation.remaining import sampler_used
from ema_scale.evaluation.shared import BASES, find_rows, folders_beside, stored_rows, wanted
from ema_scale.evaluation.store import Store
from ema_scale.inference.base import SamplerOptions
from ema_scale.inference.make import chooses_by_count, sampler_name
from ema_scale.inference.usage import describe


def describe_plan(
    targets: Sequence[EvalTarget], model: ModelRecipe, settings: EvaluationRecipe, place: Path | None = None
) -> str:
    """The evaluation of some targets of one base model, in lines. Reads files only.

    Raises UserError as the evaluation would, for banks, adapters and judges.

    Args:
        targets: each with its suites.
        model: the base model.
        settings: the recipe's evaluation section.
        place: the folder of the run or study.
    """
    check_targets(targets, ())
    targets = [as_stored(target) for target in targets]
    model = model.model_copy(update={"path": locate(model.path)})
    options = SamplerOptions(
        model,
        tuple(str(t.adapter_path) for t in targets if t.adapter_path),
        settings.max_model_len,
        extra=settings.engine,
    )
    sampler = sampler_used(targets, settings)
    if sampler is None:
        by_count = chooses_by_count(settings.sampler, options)
        sampler = sampler_name(settings.sampler, options, count_answers(targets, (), settings) if by_count else None)
    groups = plan_prompts(targets, (), model, settings, sampler)
    stores = {t.name: Store(t.out_dir) for t in targets}
    there: dict[str, Any] = {name: ChainMap({}, store.samples) for name, store in stores.items()}  # type: ignore[arg-type]
    judged: dict[str, Any] = {name: ChainMap({}, store.judgements) for name, store in stores.items()}  # type: ignore[arg-type]
    lines = [f"model    {model.path}"]
    for target in targets:
        if place is not None and target.adapter_path is None:
            lines += _taken(place, groups, target, there[target.name], judged[target.name])
    for target in targets:
        lines.append(f"target   {target.name}: {target.adapter_path or 'the base model'}, answers in {target.out_dir}")
        own = [g for g in groups if g.target is target]
        for suite in dict.fromkeys(g.suite.name for g in own):
            found = [g for g in own if g.suite.name == suite]
            lines.append(f"  {_suite(found, there[target.name], judged[target.name])}")
    keys = [(g, key) for g in groups for key in g.keys]
    written = [(g, key) for g, key in keys if g.is_scored]
    keys = [(g, key) for g, key in keys if not g.is_scored]
    if keys:
        missing = sum(key not in there[g.target.name] for g, key in keys)
        temperatures = ", ".join(f"{t:g}" for t in sorted({g.temperature for g, _ in keys}))
        lines.append(
            f"sample   {missing:,} of {quantity(len(keys), 'answer')} by {sampler}: temperature {temperatures}, top_p "
            f"{settings.top_p:g}, up to {max(g.max_tokens for g, _ in keys)} tokens"
        )
    if written:
        missing = sum(key not in there[g.target.name] for g, key in written)
        lines.append(
            f"score    {missing:,} of {quantity(len(written), 'written answer')} by {sampler}, for their likelihood"
        )
    missing_judgements = [(g, key) for g, key in keys if (key, g.judge.identity) not in judged[g.target.name]]
    judging = _judging(missing_judgements, there, settings, place)
    if (note := judged_by_bank(groups, settings.judge)) is not None:
        judging.append(f"judge    {note}")
    if keys and not judging:
        judging = [f"judge    nothing: all {len(keys):,} judgements are there"]
    lines += judging
    return "\n".join(lines)


def _taken(
    place: Path,
    groups: Sequence[PromptGroup],
    target: EvalTarget,
    there: MutableMapping[str, Sample],
    judged: MutableMapping[tuple[str, str], Judgement],
) -> list[str]:
    """Add the base model's rows that the runs and studies beside `place` have; a line for each of their folders."""
    answers, pairs = wanted(g for g in groups if g.target is target)
    missing, unjudged = (k for k in answers if k not in there), (pair for pair in pairs if pair not in judged)
    lines = []
    for found in find_rows(missing, unjudged, folders_beside(place, BASES)):
        there.update({row.key: row for row in found.samples})
        judged.update({(row.key, row.judge): row for row in found.judgements})
        counts = f"{quantity(len(found.samples), 'answer')} and {quantity(len(found.judgements), 'judgement')}"
        lines.append(f"taken    {counts} of the base model from {found.folder}, which asked the same")
    return lines


def _suite(
    groups: Sequence[PromptGroup], there: Mapping[str, Sample], judged: Mapping[tuple[str, str], Judgement]
) -> str:
    first = groups[0]
    keys = [(g, key) for g in groups for key in g.keys]
    questions = len({g.question.id for g in groups})
    wordings = f" in {len(groups)} wordings" if len(groups) > questions else ""
    asked = f"{first.suite.name} ({first.suite.role}): {quantity(questions, 'question')}{wordings}"
    if first.is_scored:
        scored = sum(key in there for _, key in keys)
        return f"{asked}, {quantity(len(keys), 'written answer')}; {scored:,} are scored"
    per_judge = Counter(g.judge.identity for g, _ in keys)
    judges = ", ".join(f"{name} ({count:,})" if len(per_judge) > 1 else name for name, count in per_judge.items())
    sampled, done = sum(key in there for _, key in keys), sum((key, g.judge.identity) in judged for g, key in keys)
    return f"{asked}, {quantity(len(keys), 'answer')}; {sampled:,} are there, {done:,} judged; judge {judges}"


def _judging(
    missing: Sequence[tuple[PromptGroup, str]],
    there: Mapping[str, Mapping[str, Sample]],
    settings: EvaluationRecipe,
    place: Path | None,
) -> list[str]:
    """A line per judge: its calls, their tokens as guessed from characters, and their price if the recipe has one."""
    lines, checked = [], set[tuple[str, str]]()
    for folder in [] if place is None else [place / CHECK, *folders_beside(place, CHECK)]:
        checked |= {(row.key, row.judge) for row in stored_rows(Judgement, folder / JUDGEMENTS_FILE)}
    for identity in dict.fromkeys(g.judge.identity for g, _ in missing):
        own = [(g, key) for g, key in missing if g.judge.identity == identity]
        judge = own[0][0].judge
        if judge.kind not in SCORING:
            lines.append(f"judge    {quantity(len(own), 'answer')} by {identity}, without a model")
            continue
        check = settings.judge.check
        labelled = load_labelled(labelled_path(settings.judge)) if check and judge.gives_verdicts else []
        also = unjudged(labelled, [judge], check, checked)
        asked = [asked_of(g, there[g.target.name].get(key)) for g, key in own]
        whole = len(also) == check * len(labelled)
        every = f" and {len(labelled)} hand-labelled ones, {check} times each"
        more = "" if not also else every if whole else f" and {len(also):,} times a hand-labelled one"
        told = describe(estimate([*asked, *also])[identity], settings.judge)
        lines.append(
            f"judge    {quantity(len(own), 'answer')}{more} by {identity}{place_of(identity, settings.judge)}: {told}"
        )
        unset = missing_judge_key(settings.judge) if judge.kind == "openai" else None
        if unset is not None:
            lines.append(f"judge    the environment variable {unset} is not set: it holds the key")
    return lines
