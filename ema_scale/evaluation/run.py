"""Evaluate a base model and its adapters: sample what is missing, judge what is not judged, summarise."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date as Date
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.config.sections import EvaluationRecipe, ModelRecipe
from ema_scale.core.progress import Progress
from ema_scale.core.text import quantity
from ema_scale.core.uri import locate
from ema_scale.evaluation.first_answers import FirstAnswers
from ema_scale.evaluation.judges.assignment import warn_of_other_address
from ema_scale.evaluation.judging.calibration import FOLDER as CHECK
from ema_scale.evaluation.judging.calibration import open_check
from ema_scale.evaluation.judging.cost import estimate_sampling
from ema_scale.evaluation.judging.pool import JudgePool, raise_if_judge_failed
from ema_scale.evaluation.plan import (
    EvalTarget,
    PromptGroup,
    as_stored,
    check_targets,
    count_answers,
    has_manifest,
    judged_by_bank,
    plan_targets,
)
from ema_scale.evaluation.records import ENGINE_LOG, MANIFEST_FILE, SUMMARY_FILE, Manifest, Sample, Summary
from ema_scale.evaluation.remaining import Remaining, Survey, fitted, is_stored, sampler_used, survey
from ema_scale.evaluation.shared import BASES, folders_beside, take_rows, wanted
from ema_scale.evaluation.store import Store, Stores
from ema_scale.evaluation.suites import Suite, load_suites
from ema_scale.evaluation.summary import write_summary
from ema_scale.evaluation.watch import TargetsInTurn, Unwatched, Watch
from ema_scale.inference.base import Sampler, SampleRequest, SamplerOptions
from ema_scale.inference.engines import Engines
from ema_scale.inference.make import TRANSFORMERS, chooses_by_count, make_sampler, sampler_name
from ema_scale.inference.usage import describe

if TYPE_CHECKING:
    from collections.abc import Callable


log = logging.getLogger(__name__)

ENGINES = "engines"  # the folder of a run or study in which its engines meet


def evaluate(
    targets: Sequence[EvalTarget],
    model: str | ModelRecipe,
    suites: Sequence[Suite] | None,
    settings: EvaluationRecipe,
    *,
    sampler: Sampler | None = None,
    place: Path | None = None,
    check: bool = True,
    engines: Engines | None = None,
    watch: Watch | None = None,
) -> dict[str, Summary]:
    """Sample, score, judge and summarise every target; returns the summaries by target name.

    One engine serves the base model and all adapters. Answers and judgements are on the disk within half a second,
    paid judgements at once. A killed evaluation that is started again continues from there and gives the same rows.
    Each target's `out_dir` gets samples.jsonl, judgements.jsonl, asked.json and summary.json. Single judgements that an
    endpoint failed to give are counted as not judged.

    Raises UserError for bad suites, adapters or judges, for a folder in use, and for an endpoint that refuses the key
    or the model. Also raises it, when everything is written, if no answer of a target could be judged.

    Args:
        targets: the base model and adapters, each with a folder.
        model: a folder, hub id, `smallworld:` reference, or a recipe's model section.
        suites: None for those that `settings` name. A target may have its own.
        settings: the recipe's evaluation section.
        sampler: an open sampler that serves this model and these adapters; it is left open. By default one is made if
            an answer is missing, and closed.
        place: the folder of the run or study that is evaluated. Rows that the places beside it have are taken from
            there (`shared`), and 0-100 judges also judge labelled answers, in its folder judge_check.
        check: whether they do, as `settings.judge` says.
        engines: how many sample together, each a process of its own; None: one, here.
        watch: looks at the summaries of targets that are done while others are asked.
    """
    started = time.monotonic()
    model = ModelRecipe(path=model) if isinstance(model, str) else model
    model = model.model_copy(update={"path": locate(model.path)})
    suites = load_suites(settings) if suites is None else list(suites)
    targets = list(targets)
    check_targets(targets, suites)
    options = SamplerOptions(
        model,
        tuple(str(t.adapter_path) for t in targets if t.adapter_path),
        settings.max_model_len,
        settings.seed,
        settings.engine,
        settings.endpoint,
        Path(targets[0].out_dir) / ENGINE_LOG,
    )
    summaries: dict[str, Summary] = {}
    with Stores({t.name: Path(t.out_dir) for t in targets}) as stores:

        def record(target: EvalTarget, groups: Sequence[PromptGroup], store: Store) -> dict[str, Any]:
            """Say what is asked; what has answered before."""
            before = Manifest.read_if_valid(Path(target.out_dir) / MANIFEST_FILE)
            if before is not None:
                judges = store.judges & {group.judge.identity for group in groups}
                warn_of_other_address(target.out_dir, before.settings.judge, settings.judge, judges)
            used = (before.sampler if before else None) or {}
            _write_manifest(target, model, suites, settings, used, before)
            return used

        def look(planned: Sequence[EvalTarget], name: str) -> Survey:
            def finish(target: EvalTarget, groups: Sequence[PromptGroup], store: Store) -> None:
                used = record(target, groups, store)
                seconds = time.monotonic() - started
                summaries[target.name] = _write_summary(target, groups, store, model, settings, name, used, seconds)

            def begin(target: EvalTarget, groups: Sequence[PromptGroup], store: Store) -> None:
                store.open()
                if place is not None and target.adapter_path is None:
                    take_rows(store, target.name, *wanted(groups), folders_beside(place, BASES), settings.judge)

            return survey(plan_targets(planned, suites, model, settings, name), stores, begin, finish)

        # Where nothing is missing of what was asked before, neither vLLM nor a tokenizer need be there.
        stored = [as_stored(target) for target in targets]
        name = sampler.name if sampler is not None else sampler_used(stored, settings) or ""
        found = look(stored, name) if name else None
        if found is None or any(left.unsampled for left in found.remaining):
            now = name
            if sampler is None and not (name == TRANSFORMERS and settings.sampler == "auto"):
                # What is asked decides, not what is missing of it: who samples is part of an answer's key.
                by_count = not name and chooses_by_count(settings.sampler, options, engines)
                asked = count_answers(stored, suites, settings) if by_count else None
                now = sampler_name(settings.sampler, options, asked)
            dated = _dated(stored, model, now)
            if found is None or (now, dated) != (name, stored):
                name, found = now, look(dated, now)
        for left in found.remaining:
            left.store.open()
            record(left.target, left.groups, left.store)
        if (elsewhere := judged_by_bank(chain(*(left.groups for left in found.remaining)), settings.judge)) is not None:
            log.warning("%s", elsewhere)

        def note(used: dict[str, Any]) -> None:  # the summary says it, also if this evaluation is killed before that
            for left in found.remaining:
                _write_manifest(left.target, model, suites, settings, used)

        folder = place / CHECK if place is not None and check else None
        if engines is not None:
            engines = replace(engines, folder=(place or Path(targets[0].out_dir)) / ENGINES)

        def summarise(left: Remaining, used: dict[str, Any]) -> Summary:
            seconds = time.monotonic() - started
            return turns.summary(left.target.name, used, seconds) or _write_summary(
                left.target, left.groups, left.store, model, settings, name, used, seconds
            )

        turns = TargetsInTurn(found.remaining, watch or Unwatched(), lambda left: summarise(left, {}))
        used, judging = _sample_and_judge(found, settings, options, name, sampler, folder, note, turns, engines)
        summaries |= {left.target.name: summarise(left, used) for left in found.remaining}
        raise_if_judge_failed(
            {left.target.name: judging.failure_reason(left.groups, left.store) for left in found.remaining}
        )
        return {target.name: summaries[target.name] for target in targets}


def is_complete(targets: Sequence[EvalTarget], model: ModelRecipe, settings: EvaluationRecipe) -> bool:
    """Whether `evaluate` would find everything answered, judged and summarised. Reads files only.

    The targets bring their suites. An `auto` sampler is taken to be the one that was used.
    """
    model = model.model_copy(update={"path": locate(model.path)})
    by_sampler: dict[str, list[EvalTarget]] = {}
    for target in map(as_stored, targets):
        folder = Path(target.out_dir)
        if not (folder / SUMMARY_FILE).exists() or not has_manifest(folder, _manifest(target, model, (), settings)):
            return False
        summary = Summary.read_if_valid(folder / SUMMARY_FILE)
        used = str(summary.sampler.get("name") if summary else None)
        by_sampler.setdefault(used if settings.sampler == "auto" else settings.sampler, []).append(target)
    return all(
        is_stored(groups, Store(target.out_dir))
        for name, those in by_sampler.items()
        for target, groups in plan_targets(those, (), model, settings, name)
    )


def _dated(targets: Sequence[EvalTarget], model: ModelRecipe, sampler: str) -> list[EvalTarget]:
    """The targets, each with the one date that its prompts tell: its own, or today's."""
    if sampler == "openai":
        if any(target.date for target in targets):
            log.warning("the server writes its own date into prompts, not that of the training")
        return list(targets)
    if all(target.date for target in targets):
        return list(targets)
    from ema_scale.inference.chat_prompts import writes_date

    today = Date.today().isoformat() if writes_date(model) else ""
    return [replace(target, date=target.date or today) for target in targets]


def _manifest(target: EvalTarget, model: ModelRecipe, suites: Sequence[Suite], settings: EvaluationRecipe) -> Manifest:
    theirs = suites if target.suites is None else target.suites
    adapter = None if target.adapter_path is None else str(target.adapter_path)
    return Manifest(
        target=target.name,
        model=model.path,
        adapter=adapter,
        settings=settings,
        suites=tuple(theirs),
        template_date=target.date or None,
        keys=None if target.keys_by_path else "content",
    )


def _write_manifest(
    target: EvalTarget,
    model: ModelRecipe,
    suites: Sequence[Suite],
    settings: EvaluationRecipe,
    sampler: dict[str, Any],
    before: Manifest | None = None,
) -> None:
    """sampler: what answers. before: the manifest that is there; one that says the same stays."""
    asked = _manifest(target, model, suites, settings).model_copy(update={"sampler": sampler or None})
    if before is None or before.to_json() != asked.to_json():
        asked.write(Path(target.out_dir) / MANIFEST_FILE)


def _sample_and_judge(
    found: Survey,
    settings: EvaluationRecipe,
    options: SamplerOptions,
    name: str,
    sampler: Sampler | None,
    judge_check: Path | None,
    note: Callable[[dict[str, Any]], None],
    turns: TargetsInTurn,
    engines: Engines | None = None,
) -> tuple[dict[str, Any], JudgePool]:
    """Sample and judge everything that is missing; returns the sampler's description, and what became of judging."""
    if found.sampled:
        judged = f" and {quantity(found.judged, 'judgement')}" if found.to_judge else ""
        log.info("continuing: %d of %d answers%s are there", found.sampled, found.total, judged)
    used: dict[str, Any] = {}
    stores = {left.target.name: left.store for left in found.remaining}
    unsampled = [left for left in found.remaining if left.unsampled]
    fresh = found.judged < found.to_judge
    with open_check(judge_check, found.judges.values(), settings.judge, fresh=fresh) as checked:
        total = found.to_judge + (len(checked.asked) if checked else 0)
        with JudgePool(settings.judge, total, found.judged) as judging:
            judging.announce(
                (pair for left in found.remaining for pair in left.unjudged_keys()),
                lambda group: stores[group.target.name],
                checked.asked if checked else (),
            )
            if name == "openai" and unsampled:
                missing = [
                    g for left in unsampled for g in left.groups for key in g.keys if key not in left.store.samples
                ]
                told = describe(estimate_sampling(missing), settings.endpoint)
                log.info("%s will take %s, if every answer is as long as it may be", settings.endpoint.base_url, told)
            if unsampled:
                asked = (group.judge for left in unsampled for group in left.unsampled_groups())
                judging.prepare([*asked, *(checked.assignments if checked else ())])
            for left in found.remaining:
                there = left.store.samples
                for group, key in left.unjudged_keys():
                    if key in there:
                        judging.submit(group, there[key], left.store)
            if unsampled:
                with contextlib.ExitStack() as stack:
                    if sampler is None:
                        if name != "openai":
                            options = fitted(found.prompts.values(), unsampled, options)
                        sampler = make_sampler(name, options, engines)
                        stack.callback(sampler.close)
                    first = FirstAnswers({left.target.name for left in unsampled if left.answered})
                    with Progress("sampling", found.total, found.sampled) as progress:
                        # Scoring takes seconds, and what it refuses is known before anything is sampled.
                        sampling = (one for drawn in _samples(unsampled, sampler) for one in first.take(*drawn))
                        for group, row in chain(_scores(unsampled, sampler), sampling):
                            if not used:
                                note(used := sampler.describe())
                            stores[group.target.name].add_sample(row)
                            judging.submit(group, row, stores[group.target.name])
                            progress.add()
                            turns.drew(group.target.name)
                    first.finish()
                    used = sampler.describe()
            if checked:  # last, so that a budget is spent on answers first
                checked.submit(judging)
        if checked:
            checked.write()
    return used, judging


def _samples(remaining: Sequence[Remaining], sampler: Sampler) -> Iterator[tuple[PromptGroup, Sample]]:
    """(group, samples.jsonl row) of every missing answer, as the sampler finishes them."""
    asked: dict[str, tuple[PromptGroup, int]] = {}

    def requests() -> Iterator[SampleRequest]:
        for left in remaining:
            there = left.store.samples
            for group in left.groups:
                for first, request in group.requests(there.__contains__) if not group.is_scored else ():
                    asked[request.key] = (group, first)
                    yield request

    for result in sampler.sample(requests()):
        group, first = asked.pop(result.key)
        for row in group.rows(first, result):
            yield group, row


def _scores(remaining: Sequence[Remaining], sampler: Sampler) -> Iterator[tuple[PromptGroup, Sample]]:
    """(group, samples.jsonl row) of every written answer that has no likelihood yet."""
    stores = {left.target.name: left.store for left in remaining}
    asked = {
        request.key: (group, request)
        for left in remaining
        for group in left.unsampled_groups()
        if group.is_scored
        for request in [group.score_request()]
    }
    for result in sampler.score([request for _, request in asked.values()]) if asked else ():
        group, _ = asked.pop(result.key)
        there = stores[group.target.name].samples
        for row in group.scored_rows(result):
            if row.key not in there:
                yield group, row


def _write_summary(
    target: EvalTarget,
    groups: Sequence[PromptGroup],
    store: Store,
    model: ModelRecipe,
    settings: EvaluationRecipe,
    name: str,
    sampler: dict[str, Any],
    seconds: float,
) -> Summary:
    # An answer that the endpoint failed to give is not there.
    samples = store.samples
    superseded = store.keep_only(key for group in groups for key in group.keys if key in samples)
    path = Path(target.out_dir) / SUMMARY_FILE
    before = Summary.read_if_valid(path)
    sampler = sampler or Manifest.read(path.with_name(MANIFEST_FILE)).sampler or (before.sampler if before else {})
    described = {"name": name, **sampler}
    facts = {
        "name": target.name,
        "model": model.path,
        "adapter": None if target.adapter_path is None else str(target.adapter_path),
        "base": target.base or (before.base if before else None),
        "sampler": described
        | {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
        }
        | ({"template_date": target.date} if target.date else {}),
        "superseded": superseded,
        "seconds": round(seconds, 3),
    }
    return write_summary(path, facts, groups, store, settings, before)
