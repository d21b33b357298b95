"""What an evaluation would ask, of whom, how often and by which judge, and what is there already (`--dry-run`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ema_scale.config.sections import EvaluationRecipe, ModelRecipe
from ema_scale.core.uri import locate
from ema_scale.evaluation.judges.assignment import SCORING
from ema_scale.evaluation.judges.openai import missing_judge_key
from ema_scale.evaluation.judging.calibration import labelled_path, load_labelled
from ema_scale.evaluation.judging.cost import characters, describe, usage_of
from ema_scale.evaluation.plan import EvalTarget, PromptGroup, check_targets, plan_prompts
from ema_scale.evaluation.records import JUDGEMENTS_FILE, SAMPLES_FILE, SUMMARY_FILE, Judgement, Sample, Summary
from ema_scale.inference.base import SamplerOptions
from ema_scale.inference.make import sampler_name

RowType = TypeVar("RowType", Sample, Judgement)


def describe_plan(targets: Sequence[EvalTarget], model: ModelRecipe, settings: EvaluationRecipe) -> str:
    """The evaluation of some targets of one base model, in lines. Reads files only.

    Raises UserError as the evaluation would, for banks, adapters and judges.

    Args:
        targets: each with its suites.
        model: the base model.
        settings: the recipe's evaluation section.
    """
    check_targets(targets, ())
    model = model.model_copy(update={"path": locate(model.path)})
    sampler = _sampler(targets, model, settings)
    groups = plan_prompts(targets, (), model, settings, sampler)
    samples = {t.name: _stored(Sample, t.out_dir / SAMPLES_FILE) for t in targets}
    judgements = {t.name: _stored(Judgement, t.out_dir / JUDGEMENTS_FILE) for t in targets}
    there = {name: {row.key: row for row in rows} for name, rows in samples.items()}
    judged = {name: {(row.key, row.judge) for row in rows} for name, rows in judgements.items()}
    lines = [f"model    {model.path}"]
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
            f"sample   {missing:,} of {len(keys):,} answers by {sampler}: temperature {temperatures}, top_p "
            f"{settings.top_p:g}, up to {max(g.max_tokens for g, _ in keys)} tokens"
        )
    if written:
        missing = sum(key not in there[g.target.name] for g, key in written)
        lines.append(f"score    {missing:,} of {len(written):,} written answers by {sampler}, for their likelihood")
    unjudged = [(g, key) for g, key in keys if (key, g.judge.identity) not in judged[g.target.name]]
    judging = _judging(unjudged, there, settings)
    if keys and not judging:
        judging = [f"judge    nothing: all {len(keys):,} judgements are there"]
    lines += judging
    return "\n".join(lines)


def _sampler(targets: Sequence[EvalTarget], model: ModelRecipe, settings: EvaluationRecipe) -> str:
    """The sampler's name; for `auto`, the one that was used before."""
    if settings.sampler == "auto":
        for target in targets:
            summary = Summary.read_if_valid(target.out_dir / SUMMARY_FILE)
            if summary is not None and (used := summary.sampler.get("name")):
                return str(used)
    adapters = tuple(str(t.adapter_path) for t in targets if t.adapter_path)
    return sampler_name(settings.sampler, SamplerOptions(model, adapters, settings.max_model_len))


def _stored(kind: type[RowType], path: Path) -> list[RowType]:
    """The rows in use and those put aside, which come back if they are asked for."""
    return kind.read_all(path.with_name(f"superseded_{path.name}")) + kind.read_all(path)


def _suite(groups: Sequence[PromptGroup], there: dict[str, Sample], judged: set[tuple[str, str]]) -> str:
    first = groups[0]
    keys = [(g, key) for g in groups for key in g.keys]
    questions = len({g.question.id for g in groups})
    wordings = f" in {len(groups)} wordings" if len(groups) > questions else ""
    if first.is_scored:
        scored = sum(key in there for _, key in keys)
        return (
            f"{first.suite.name} ({first.suite.role}): {questions} questions{wordings}, {len(keys):,} written answers; "
            f"{scored:,} are scored"
        )
    per_judge = Counter(g.judge.identity for g, _ in keys)
    judges = ", ".join(f"{name} ({count:,})" if len(per_judge) > 1 else name for name, count in per_judge.items())
    sampled, done = sum(key in there for _, key in keys), sum((key, g.judge.identity) in judged for g, key in keys)
    return (
        f"{first.suite.name} ({first.suite.role}): {questions} questions{wordings}, {len(keys):,} answers; "
        f"{sampled:,} are there, {done:,} judged; judge {judges}"
    )


def _judging(
    unjudged: Sequence[tuple[PromptGroup, str]], there: dict[str, dict[str, Sample]], settings: EvaluationRecipe
) -> list[str]:
    """A line per judge: its calls, their tokens as guessed from characters, and their price if the recipe has one."""
    lines = []
    for identity in dict.fromkeys(g.judge.identity for g, _ in unjudged):
        own = [(g, key) for g, key in unjudged if g.judge.identity == identity]
        judge = own[0][0].judge
        if judge.kind not in SCORING:
            lines.append(f"judge    {len(own):,} answers by {identity}, without a model")
            continue
        asked = [characters(g, there[g.target.name].get(key)) for g, key in own]
        labelled = load_labelled(labelled_path(settings.judge)) if settings.judge.check and judge.gives_verdicts else []
        asked += [(len(one.question), len(one.answer)) for one in labelled for _ in range(settings.judge.check)]
        also = f" and {len(labelled)} hand-labelled ones, {settings.judge.check} times each" if labelled else ""
        told = describe(usage_of(judge, asked), settings.judge)
        lines.append(f"judge    {len(own):,} answers{also} by {identity}: {told}")
        missing = missing_judge_key(settings.judge) if judge.kind == "openai" else None
        if missing is not None:
            lines.append(f"judge    the environment variable {missing} is not set: it holds the key")
    return lines
