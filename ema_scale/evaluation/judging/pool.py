"""Judging beside sampling: judges get answers as they are drawn, and their judgements are stored as they come."""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.core.errors import UserError
from ema_scale.core.progress import Progress
from ema_scale.evaluation.judges.assignment import LIKELIHOOD, NOBODY, SCORING, JudgeSpec, base_identity, make_judge
from ema_scale.evaluation.judges.base import Judge, JudgeFailure, JudgeItem
from ema_scale.evaluation.judges.scores import ScoreRule, rescore
from ema_scale.evaluation.judging.cost import Asked, asked_of, estimate, place_of
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import Judgement, Sample
from ema_scale.evaluation.store import Store
from ema_scale.inference.base import PROMPT_TOO_LONG
from ema_scale.inference.completion import CONTENT_FILTER
from ema_scale.inference.thoughts import split_reasoning
from ema_scale.inference.usage import describe

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe

log = logging.getLogger(__name__)

UNFINISHED, NO_JUDGE = "unfinished reasoning", "no judge was asked for"


def stored_answer(sample: Sample) -> tuple[str, str, bool]:
    """(reasoning, answer, finished) of a stored answer. Without a reasoning field, the answer still holds both.

    An answer of which nothing is left without its thoughts is not finished, whatever its finish reason.
    """
    if "reasoning" not in sample.model_fields_set:
        return split_reasoning(sample.answer)
    return sample.reasoning or "", sample.answer, sample.reasoning is None or bool(sample.answer)


class JudgePool:
    """All judges of an evaluation. `submit` does not wait for an endpoint; leaving the context waits for every judge.

    What a judge raises is raised by the next `submit`, or on leaving the context. If the context is left by an
    exception, what is still queued stays unjudged.
    """

    def __init__(self, settings: JudgeRecipe, total: int, done: int) -> None:
        self.settings = settings
        self.undone: Counter[str] = Counter()
        self._failed: dict[Path, Counter[str]] = defaultdict(Counter)
        self._judges: dict[tuple[str, str | None], Judge] = {}
        self._progress = Progress("judging", total, done, shown=total > 0)
        self._lock = threading.Lock()

    def announce(
        self,
        missing: Iterable[tuple[PromptGroup, str]],
        store_of: Callable[[PromptGroup], Store],
        also: Iterable[Asked] = (),
    ) -> None:
        """Say, before the first call, what judging these answers will take, and what is asked beside them. Stored
        replies take no call."""
        asked = (
            asked_of(group, store_of(group).samples.get(key))
            for group, key in missing
            if group.judge.kind in SCORING and self._rescore_stored(key, group.judge.identity, store_of(group)) is None
        )
        also = list(also)
        labelled = Counter(judge.identity for judge, _ in also)
        for identity, usage in estimate(chain(asked, also)).items():
            checked = f"; {labelled[identity]:,} hand-labelled answers, which check it, included" if also else ""
            where = place_of(identity, self.settings)
            log.info("the judge %s%s will take %s%s", identity, where, describe(usage, self.settings), checked)

    def submit(self, group: PromptGroup, sample: Sample, store: Store) -> None:
        """Queue one stored answer for its judge, or store its judgement here if no judge is needed."""
        if not group.is_judged:
            dropped = None if group.is_scored else NO_JUDGE
            row = Judgement(key=sample.key, judge=group.judge.identity, label=sample.label, dropped=dropped)
            store.add_judgement(row, at_once=False)
            return
        reasoning, answer, finished = stored_answer(sample)
        dropped = None if finished else UNFINISHED
        if sample.finish_reason in (PROMPT_TOO_LONG, CONTENT_FILTER):
            dropped = sample.finish_reason
        identity = group.judge.identity
        if dropped is not None:
            self.add(store, Judgement(key=sample.key, judge=identity, dropped=dropped), at_once=False)
            return
        if (again := self._rescore_stored(sample.key, identity, store)) is not None:
            self.add(store, again, at_once=False)
            return
        item = JudgeItem(
            key=f"{group.target.name}|{sample.key}",
            judge=identity,
            question=sample.asked,
            answer=answer,
            reasoning=reasoning,
            expected=group.question.expected,
            meta=group.question.meta,
            prompts=group.judge.prompts,
        )
        judge = self._judge(group.judge)

        def settle(outcome: Judgement | JudgeFailure) -> None:
            if isinstance(outcome, JudgeFailure):
                self.count_failure(outcome, store)
            else:  # the judge sees keys that are unique over all targets; the store does not
                self.add(store, outcome.model_copy(update={"key": sample.key}), at_once=judge.paid)

        judge.submit(item, settle)

    def _rescore_stored(self, key: str, identity: str, store: Store) -> Judgement | None:
        """The judgement from stored replies that were read by another rule; None if there are none."""
        rule = ScoreRule(self.settings.min_mass, self.settings.score == "most_likely")
        for other in store.judges:
            if other == identity or base_identity(other) != base_identity(identity):
                continue
            if (row := store.judgements.get((key, other))) is not None:
                return rescore(row, identity, rule)
        return None

    def prepare(self, specs: Iterable[JudgeSpec]) -> None:
        """Make these judges now, so that one that cannot judge fails before anything is sampled for it.

        Raises UserError as `make_judge` does.
        """
        for spec in specs:
            if spec.kind not in (LIKELIHOOD, NOBODY):
                self._judge(spec)

    def _judge(self, spec: JudgeSpec) -> Judge:
        name = (spec.kind, spec.model or spec.identity)
        if name not in self._judges:
            self._judges[name] = make_judge(spec, self.settings)
        return self._judges[name]

    def add(self, store: Store, judgement: Judgement, *, at_once: bool) -> None:
        store.add_judgement(judgement, at_once=at_once)
        with self._lock:
            self._progress.add()

    def count_failure(self, outcome: JudgeFailure, store: Store) -> None:
        with self._lock:
            self.undone[outcome.reason] += 1
            if outcome.failed:
                self._failed[store.folder][outcome.reason] += 1

    def failure_reason(self, groups: Iterable[PromptGroup], store: Store) -> str | None:
        """Why 0-100 judges judged none of these answers, if the judge failed; None if some answer was judged.

        Exact judges, and answers that need no judge, do not count.
        """
        failed = self._failed.get(store.folder)
        if not failed:
            return None
        for group in groups:
            for key in group.keys if group.judge.kind in SCORING else ():
                row = store.judged(key, group.judge.identity)
                if row is not None and row.dropped not in (UNFINISHED, PROMPT_TOO_LONG):
                    return None
        return failed.most_common(1)[0][0]

    def __enter__(self) -> JudgePool:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        errors: list[Exception] = []
        for judge in self._judges.values():
            if kind is not None or errors:
                judge.abandon()
                continue
            try:
                judge.finish()
            except Exception as error:  # raised when every judge has ended
                errors.append(error)
        self._progress.__exit__()
        for name, judge in self._judges.items():
            if judge.used.calls:
                log.info("the judge %s took %s", name[1], describe(judge.used, self.settings))
        if errors:
            raise errors[0]
        if self.undone:
            reason = self.undone.most_common(1)[0][0]
            log.warning(
                "%d judgements could not be made (%s); they are counted as not judged, and running the same "
                "command again makes them",
                self.undone.total(),
                reason,
            )


def raise_if_judge_failed(reasons: Mapping[str, str | None]) -> None:
    """Raises UserError if a judge scored no answer of some target. reasons: target -> `failure_reason`."""
    silent = {name: reason for name, reason in reasons.items() if reason is not None}
    if silent:
        raise UserError(
            f"evaluation.judge: no answer of {', '.join(silent)} could be judged ({next(iter(silent.values()))}); the "
            "answers are kept, and the same command judges them"
        )
