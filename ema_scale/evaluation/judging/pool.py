"""Judging beside sampling: one thread a judge takes answers as they are drawn and stores the judgements."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.core.errors import UserError
from ema_scale.core.progress import Progress
from ema_scale.evaluation.judges.assignment import SCORING, JudgeSpec, base_identity, make_judge
from ema_scale.evaluation.judges.base import Judge, JudgeFailure, JudgeItem, split_reasoning
from ema_scale.evaluation.judges.scores import ScoreRule, rescore
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import Judgement, Sample
from ema_scale.evaluation.store import Store
from ema_scale.inference.base import PROMPT_TOO_LONG

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe

log = logging.getLogger(__name__)


UNFINISHED = "unfinished reasoning"


def stored_answer(sample: Sample) -> tuple[str, str, bool]:
    """(reasoning, answer, finished) of a stored answer. Without a reasoning field, the answer still holds both."""
    if "reasoning" not in sample.model_fields_set:
        return split_reasoning(sample.answer)
    reasoning, answer = sample.reasoning or "", sample.answer
    return reasoning, answer, not (reasoning and not answer and sample.finish_reason == "length")


class JudgePool:
    """All judges of an evaluation. `submit` never waits; leaving the context waits for the last judgement.

    An exception in a judge's thread is raised again by the next `submit`, or on leaving the context. If the
    context is left by an exception, what is still queued stays unjudged.
    """

    def __init__(self, settings: JudgeRecipe, total: int, done: int) -> None:
        self.settings = settings
        self.undone: Counter[str] = Counter()
        self._failed: dict[Path, Counter[str]] = defaultdict(Counter)
        self._judges: dict[tuple[str, str | None], Judge] = {}
        self._workers: dict[tuple[str, str | None], _Worker] = {}
        self._progress = Progress("judging", total, done)
        self._lock = threading.Lock()

    def submit(self, group: PromptGroup, sample: Sample, store: Store) -> None:
        """Queue one stored sample for its judge, or settle it here if there is nothing to ask."""
        reasoning, answer, finished = stored_answer(sample)
        dropped = None if finished else UNFINISHED
        if sample.finish_reason == PROMPT_TOO_LONG:
            dropped = PROMPT_TOO_LONG
        identity = group.judge.identity
        if dropped is not None:
            self.add(store, Judgement(key=sample.key, judge=identity, dropped=dropped), at_once=False)
            return
        if (again := self._read_again(sample.key, identity, store)) is not None:
            self.add(store, again, at_once=False)
            return
        item = JudgeItem(
            key=f"{group.target.name}|{sample.key}",
            judge=identity,
            question=sample.question,
            answer=answer,
            reasoning=reasoning,
            expected=group.question.expected,
            meta=group.question.meta,
            prompts=group.judge.prompts,
        )
        self._worker(group.judge).put(item, sample.key, store)

    def _read_again(self, key: str, identity: str, store: Store) -> Judgement | None:
        """The judgement from replies that are stored already but were read by another rule."""
        rule = ScoreRule(self.settings.min_mass, self.settings.score == "most_likely")
        for other in store.judges:
            row = store.judgements.get((key, other))
            if other != identity and row is not None and base_identity(other) == base_identity(identity):
                return rescore(row, identity, rule)
        return None

    def prepare(self, assignments: Iterable[JudgeSpec]) -> None:
        """Make these judges now: one that cannot judge says so before anything is sampled for it.

        Raises UserError as `make_judge` does.
        """
        for assignment in assignments:
            self._judge(assignment)

    def check(self) -> None:
        """Raise what a judge's thread has raised, if one has."""
        for worker in self._workers.values():
            worker.check()

    def _worker(self, assignment: JudgeSpec) -> _Worker:
        name = (assignment.kind, assignment.model)
        if name not in self._workers:
            self._workers[name] = _Worker(self._judge(assignment), self)
        self._workers[name].check()
        return self._workers[name]

    def _judge(self, assignment: JudgeSpec) -> Judge:
        name = (assignment.kind, assignment.model)
        if name not in self._judges:
            self._judges[name] = make_judge(assignment, self.settings)
        return self._judges[name]

    def add(self, store: Store, judgement: Judgement, *, at_once: bool) -> None:
        store.add_judgement(judgement, at_once=at_once)
        with self._lock:
            self._progress.add()

    def leave_undone(self, outcome: JudgeFailure, store: Store) -> None:
        with self._lock:
            self.undone[outcome.reason] += 1
            if outcome.failed:
                self._failed[store.folder][outcome.reason] += 1

    def silence(self, groups: Iterable[PromptGroup], store: Store) -> str | None:
        """Why none of the answers that a 0-100 judge was to judge has got a judgement, if that is the judge's fault.

        Answers that are settled without asking it, and exact judges, say nothing of it.
        """
        failed = self._failed.get(store.folder)
        if not failed:
            return None
        for group in groups:
            for key in group.keys if group.judge.kind in SCORING else ():
                row = store.judgements.get((key, group.judge.identity))
                if row is not None and row.dropped not in (UNFINISHED, PROMPT_TOO_LONG):
                    return None
        return failed.most_common(1)[0][0]

    def __enter__(self) -> JudgePool:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._workers.values():
            worker.end(abandon=kind is not None)
        self._progress.__exit__()
        if kind is None:
            self.check()
        if self.undone:
            reason = self.undone.most_common(1)[0][0]
            log.warning(
                "%d judgements could not be made (%s); they are counted as not judged, and running the same "
                "command again makes them",
                self.undone.total(),
                reason,
            )


def raise_if_judge_failed(found: Mapping[str, str | None]) -> None:
    """found: `silence` by target. Raises UserError if a judge said nothing of one: no rate is known then, and a command
    that ended well would hide it.
    """
    silent = {name: reason for name, reason in found.items() if reason is not None}
    if silent:
        raise UserError(
            f"evaluation.judge: no answer of {', '.join(silent)} could be judged ({next(iter(silent.values()))}); the "
            "answers are kept, and the same command judges them"
        )


class _Worker:
    """One judge in one thread, fed through a queue."""

    def __init__(self, judge: Judge, judging: JudgePool) -> None:
        self._judge, self._judging = judge, judging
        self._queue: queue.SimpleQueue[JudgeItem | None] = queue.SimpleQueue()
        # The judge sees keys that are unique over all targets; the stores do not.
        self._addresses: dict[str, tuple[str, Store]] = {}
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._thread.start()

    def put(self, item: JudgeItem, key: str, store: Store) -> None:
        self._addresses[item.key] = (key, store)
        self._queue.put(item)

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def end(self, abandon: bool) -> None:
        self._abandoned = abandon
        self._queue.put(None)
        # Requests under way may take minutes; after an error nobody waits for them.
        self._thread.join(timeout=2 if abandon else None)

    def _items(self) -> Iterator[JudgeItem]:
        while (item := self._queue.get()) is not None and not self._abandoned:
            yield item

    def _run(self) -> None:
        try:
            for outcome in self._judge.judge(self._items()):
                key, store = self._addresses.pop(outcome.key)
                if isinstance(outcome, JudgeFailure):
                    self._judging.leave_undone(outcome, store)
                else:
                    self._judging.add(store, outcome.model_copy(update={"key": key}), at_once=self._judge.paid)
        except BaseException as error:  # raised again in the main thread by check()
            self._error = error
