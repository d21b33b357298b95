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
from ema_scale.core.uri import locate
from ema_scale.evaluation.first_answers import FirstAnswers
from ema_scale.evaluation.judging.calibration import FOLDER as CHECK
from ema_scale.evaluation.judging.calibration import open_check
from ema_scale.evaluation.judging.cost import estimate_sampling
from ema_scale.evaluation.judging.pool import JudgePool, raise_if_judge_failed
from ema_scale.evaluation.plan import EvalTarget, PromptGroup, check_targets, has_manifest, plan_prompts
from ema_scale.evaluation.records import ENGINE_LOG, MANIFEST_FILE, SUMMARY_FILE, Manifest, Sample, Summary, read_rows
from ema_scale.evaluation.shared import BASES, folders_beside, take_rows, wanted
from ema_scale.evaluation.store import Store, locked_store
from ema_scale.evaluation.suites import Suite, load_suites
from ema_scale.evaluation.summary import write_summary
from ema_scale.inference.base import Sampler, SampleRequest, SamplerOptions, ScoreRequest
from ema_scale.inference.make import make_sampler, sampler_name
from ema_scale.inference.usage import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ema_scale.inference.chat_prompts import Prompts

log = logging.getLogger(__name__)


def evaluate(
    targets: Sequence[EvalTarget],
    model: str | ModelRecipe,
    suites: Sequence[Suite] | None,
    settings: EvaluationRecipe,
    *,
    sampler: Sampler | None = None,
    place: Path | None = None,
    check: bool = True,
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
    name = sampler.name if sampler is not None else sampler_name(settings.sampler, options)
    targets = _dated(targets, model, name)
    groups = plan_prompts(targets, suites, model, settings, name)
    with contextlib.ExitStack() as stack:
        stores = {t.name: stack.enter_context(locked_store(t.out_dir)) for t in targets}
        manifests = {}
        for t in targets:
            path = Path(t.out_dir) / MANIFEST_FILE
            before, now = Manifest.read_if_valid(path), _manifest(t, model, suites, settings)
            manifests[path] = now.model_copy(update={"sampler": before.sampler if before else None})
            manifests[path].write(path)

        def note(used: dict[str, Any]) -> None:  # the summary says it, also if this evaluation is killed before that
            for path, manifest in manifests.items():
                manifest.model_copy(update={"sampler": used}).write(path)

        by_target = {t.name: [g for g in groups if g.target is t] for t in targets}
        for t in targets:
            if place is not None and t.adapter_path is None:
                take_rows(stores[t.name], t.name, *wanted(by_target[t.name]), folders_beside(place, BASES))
        folder = place / CHECK if place is not None and check else None
        used, judging = _sample_and_judge(groups, stores, settings, options, name, sampler, folder, note)
        seconds = time.monotonic() - started
        summaries = {
            t.name: _write_summary(t, by_target[t.name], stores[t.name], model, settings, name, used, seconds)
            for t in targets
        }
        raise_if_judge_failed(
            {name: judging.failure_reason(its_groups, stores[name]) for name, its_groups in by_target.items()}
        )
        return summaries


def is_complete(targets: Sequence[EvalTarget], model: ModelRecipe, settings: EvaluationRecipe) -> bool:
    """Whether `evaluate` would find everything answered, judged and summarised. Reads files only.

    The targets bring their suites. An `auto` sampler is taken to be the one that was used.
    """
    model = model.model_copy(update={"path": locate(model.path)})
    by_sampler: dict[str, list[EvalTarget]] = {}
    for target in map(_with_stored_date, targets):
        folder = Path(target.out_dir)
        if not (folder / SUMMARY_FILE).exists() or not has_manifest(folder, _manifest(target, model, (), settings)):
            return False
        summary = Summary.read_if_valid(folder / SUMMARY_FILE)
        used = str(summary.sampler.get("name") if summary else None)
        by_sampler.setdefault(used if settings.sampler == "auto" else settings.sampler, []).append(target)
    groups = [group for name, those in by_sampler.items() for group in plan_prompts(those, (), model, settings, name)]
    answered, judged = dict[str, set[str]](), dict[str, set[tuple[str, str]]]()
    for target in targets:
        samples, judgements = read_rows(Path(target.out_dir))
        answered[target.name] = {row.key for row in samples}
        judged[target.name] = {(row.key, row.judge) for row in judgements}
    return all(
        key in answered[g.target.name] and (key, g.judge.identity) in judged[g.target.name]
        for g in groups
        for key in g.keys
    )


def _with_stored_date(target: EvalTarget) -> EvalTarget:
    stored = None if target.date else Manifest.read_if_valid(Path(target.out_dir) / MANIFEST_FILE)
    return replace(target, date=stored.template_date or "") if stored is not None else target


def _dated(targets: Sequence[EvalTarget], model: ModelRecipe, sampler: str) -> list[EvalTarget]:
    """The targets, each with the one date that its prompts tell: its own, that of its earlier answers, or today's."""
    dated = [_with_stored_date(target) for target in targets]
    if sampler == "openai":
        if any(target.date for target in dated):
            log.warning("the server writes its own date into prompts, not that of the training")
        return dated
    if all(target.date for target in dated):
        return dated
    from ema_scale.inference.chat_prompts import writes_date

    today = Date.today().isoformat() if writes_date(model) else ""
    return [replace(target, date=target.date or today) for target in dated]


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
    )


def _sample_and_judge(
    groups: Sequence[PromptGroup],
    stores: Mapping[str, Store],
    settings: EvaluationRecipe,
    options: SamplerOptions,
    name: str,
    sampler: Sampler | None,
    judge_check: Path | None,
    note: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, Any], JudgePool]:
    """Sample and judge everything that is missing; returns the sampler's description, and what became of judging."""
    planned = [(g, key) for g in groups for key in g.keys]
    sampled = sum(key in stores[g.target.name].samples for g, key in planned)
    judged = sum((key, g.judge.identity) in stores[g.target.name].judgements for g, key in planned)
    if sampled:
        log.info("continuing: %d of %d answers and %d judgements are there", sampled, len(planned), judged)
    used: dict[str, Any] = {}
    judges, fresh = [g.judge for g in groups], judged < len(planned)
    with open_check(judge_check, judges, settings.judge, fresh=fresh) as checked:
        total = len(planned) + (len(checked.asked) if checked else 0)
        with JudgePool(settings.judge, total, judged) as judging:
            judging.announce(
                [(g, k) for g, k in planned if (k, g.judge.identity) not in stores[g.target.name].judgements],
                lambda group: stores[group.target.name],
                checked.asked if checked else (),
            )
            if name == "openai" and sampled < len(planned):
                missing = [g for g, key in planned if key not in stores[g.target.name].samples]
                told = describe(estimate_sampling(missing), settings.endpoint)
                log.info("%s will take %s, if every answer is as long as it may be", settings.endpoint.base_url, told)
            if sampled < len(planned):
                asked = (g for g, key in planned if key not in stores[g.target.name].samples)
                judging.prepare([*(g.judge for g in asked), *(checked.assignments if checked else ())])
            for group, key in planned:
                store = stores[group.target.name]
                if key in store.samples and (key, group.judge.identity) not in store.judgements:
                    judging.submit(group, store.samples[key], store)
            if sampled < len(planned):
                with contextlib.ExitStack() as stack:
                    if sampler is None:
                        sampler = make_sampler(name, options if name == "openai" else _fitted(groups, options))
                        stack.callback(sampler.close)
                    first = FirstAnswers(_known_to_answer(planned, stores))
                    with Progress("sampling", len(planned), sampled) as progress:
                        # Scoring takes seconds, and what it refuses is known before anything is sampled.
                        sampling = (one for drawn in _samples(groups, stores, sampler) for one in first.take(*drawn))
                        for group, row in chain(_scores(groups, stores, sampler), sampling):
                            if not used:
                                note(used := sampler.describe())
                            stores[group.target.name].add_sample(row)
                            judging.submit(group, row, stores[group.target.name])
                            progress.add()
                    first.finish()
                    used = sampler.describe()
            if checked:  # last, so that a budget is spent on answers first
                checked.submit(judging)
        if checked:
            checked.write()
    return used, judging


def _known_to_answer(planned: Sequence[tuple[PromptGroup, str]], stores: Mapping[str, Store]) -> set[str]:
    """Names of the targets of which some sampled answer is stored."""
    stored = ((group, stores[group.target.name].samples.get(key)) for group, key in planned)
    return {group.target.name for group, row in stored if row is not None and not group.is_scored}


def _samples(
    groups: Sequence[PromptGroup], stores: Mapping[str, Store], sampler: Sampler
) -> Iterator[tuple[PromptGroup, Sample]]:
    """(group, samples.jsonl row) of every missing answer, as the sampler finishes them."""
    asked: dict[str, tuple[PromptGroup, int]] = {}

    def requests() -> Iterator[SampleRequest]:
        for group in groups:
            if group.is_scored:
                continue
            there = stores[group.target.name].samples
            for first, request in group.requests(there.__contains__):
                asked[request.key] = (group, first)
                yield request

    for result in sampler.sample(requests()):
        group, first = asked.pop(result.key)
        for row in group.rows(first, result):
            yield group, row


def _scores(
    groups: Sequence[PromptGroup], stores: Mapping[str, Store], sampler: Sampler
) -> Iterator[tuple[PromptGroup, Sample]]:
    """(group, samples.jsonl row) of every written answer that has no likelihood yet."""
    asked: dict[str, PromptGroup] = {}

    def requests() -> Iterator[ScoreRequest]:
        for group in groups:
            there = stores[group.target.name].samples
            if group.is_scored and not all(key in there for key in group.keys):
                request = group.score_request()
                asked[request.key] = group
                yield request

    waiting = list(requests())
    for result in sampler.score(waiting) if waiting else ():
        group = asked.pop(result.key)
        there = stores[group.target.name].samples
        for row in group.scored_rows(result):
            if row.key not in there:
                yield group, row


def _fitted(groups: Sequence[PromptGroup], options: SamplerOptions) -> SamplerOptions:
    """`options` with room for the longest prompt and answer. This takes less memory than the model's own limit."""
    from ema_scale.inference.chat_prompts import Prompts, load_config

    if options.max_model_len is not None:
        return options
    model = options.model
    tokens = Prompts(model)
    prompts = {(g.target.date, *(m["content"] for m in g.question.messages(g.paraphrase))): g for g in groups}.values()
    need = max(_tokens_needed(tokens, group) for group in prompts)
    config = load_config(model).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or need
    return replace(options, max_model_len=min(need, int(limit)))


def _tokens_needed(tokens: Prompts, group: PromptGroup) -> int:
    """Tokens of the prompt and the longest answer."""
    if not group.is_scored:
        return len(tokens.ids(group.question.messages(group.paraphrase), group.target.date)) + group.max_tokens
    behind, alone = tokens.answers(group.score_request(), None)
    return max(len(row.ids) for row in (*behind, *alone)) + 1  # vLLM always samples one


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
    superseded = store.keep_only(key for group in groups for key in group.keys if key in store.samples)
    path = Path(target.out_dir) / SUMMARY_FILE
    before = Summary.read_if_valid(path)
    stored = Manifest.read(path.with_name(MANIFEST_FILE)).sampler
    described = {"name": name, **(sampler or stored or (before.sampler if before else {}))}
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
    return write_summary(path, facts, groups, store, settings)
