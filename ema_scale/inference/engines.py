"""A sampler of many engines, on this machine and on others: they answer one queue (`engine_queue`)."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from ema_scale.core.devices import engine_gpus, one_of, visible_gpus
from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.io import file_lock, open_append
from ema_scale.inference.base import SampleRequest, SampleResult, SamplerOptions, ScoreRequest, ScoreResult
from ema_scale.inference.engine_queue import WORK, AnswerFiles, Request, Result, Work, is_done, split, write_batch

log = logging.getLogger(__name__)

DESCRIPTION = "sampler.json"
POLL_SECONDS = 0.2
RESTARTS = 2  # of an engine here that dies without saying why
CLOSE_SECONDS = 60.0

ResultType = TypeVar("ResultType", SampleResult, ScoreResult)


@dataclass(frozen=True)
class Engines:
    """How many engines sample together.

    Args:
        count: engines in all.
        assisted: only one of them is started here; the others are lent elsewhere (`engine_worker.serve`).
        folder: where they meet; all of their machines see it.
    """

    count: int
    assisted: bool = False
    folder: Path = Path("engines")

    @property
    def here(self) -> int:
        return 1 if self.assisted else self.count


@dataclass
class _Engine:
    """One that was started here."""

    number: int
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    failed: bool = field(default=False)


class ManyEngines:
    """Splits requests over engines, each of which holds the model and all adapters, and yields answers as they come.

    What an engine answered is on the disk half a second later. If one dies, another one asks what it had not answered,
    and it is started again. After a kill, the same evaluation takes what the engines had written.

    Raises UserError for engines that do not fit on this machine's GPUs, what an engine raises, and if all engines of
    this machine have died.
    """

    def __init__(self, sampler: str, options: SamplerOptions, engines: Engines) -> None:
        self.name, self.options, self.engines = sampler, options, engines
        self.folder = engines.folder
        environments = _environments(sampler, options, engines.here)
        with contextlib.ExitStack() as stack:
            busy = UserError(f"{self.folder}: another evaluation uses these engines; wait for it to end")
            stack.enter_context(file_lock(self.folder / ".lock", busy))
            (self.folder / WORK).unlink(missing_ok=True)
            for old in self.folder.glob("*.error"):
                old.unlink()
            self._left_over = {r.key: r for batch in self.folder.iterdir() if batch.is_dir() for r in _answers(batch)}
            if not self._left_over:
                (self.folder / DESCRIPTION).unlink(missing_ok=True)
            self._lock = stack.pop_all()
        if self._left_over:
            log.info("%s: takes %d requests that engines answered before", self.folder, len(self._left_over))
        self._batches: list[str] = []
        self._local = [
            _Engine(number, environment, self.folder / f"engine-{number}.log")
            for number, environment in enumerate(environments)
        ]
        self._answered = True
        self._closed = False

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        return self._ask(list(requests), SampleResult)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        return self._ask(list(requests), ScoreResult)

    def _ask(self, requests: Sequence[Request], kind: type[ResultType]) -> Iterator[ResultType]:
        waiting = {request.key: request for request in requests}
        for key, request in list(waiting.items()):
            if key in self._left_over and _answers_all(self._left_over[key], request):
                del waiting[key]
                yield cast(ResultType, self._left_over.pop(key))
        if waiting:
            self._answered = False
            batch = f"{time.time_ns()}"
            chunks = split(list(waiting.values()), self.engines.count)
            write_batch(self.folder / batch, chunks)
            self._batches.append(batch)
            Work(self.name, self.options, tuple(self._batches)).write(self.folder)
            for engine in self._local:
                if engine.process is None:
                    self._start(engine)
            answers = AnswerFiles(self.folder / batch)
            while waiting:
                # Before the answers are read: if all are done, all are on the disk.
                all_done = is_done(self.folder / batch, len(chunks))
                came = [result for result in answers.new() if waiting.pop(result.key, None) is not None]
                yield from (cast(ResultType, result) for result in came)
                if waiting and all_done:
                    raise UserError(f"{self.folder}: engines ended without an answer to {next(iter(waiting))}")
                if not came:
                    self._watch()
                    time.sleep(POLL_SECONDS)
            self._answered = True

    def _start(self, engine: _Engine) -> None:
        command = [sys.executable, "-m", "ema_scale.inference.engine_worker", str(self.folder)]
        with open_append(engine.log) as said:
            # Its standard input is the sign that this process lives.
            engine.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=said, stderr=said, env={**os.environ, **engine.environment}
            )

    def _watch(self) -> None:
        """Start those again that died. Raises UserError for what one of any machine said before it ended."""
        for said in self.folder.glob("*.error"):
            raise UserError(said.read_text(encoding="utf-8", errors="replace").strip())
        for engine in self._local:
            if engine.failed or engine.process is None or (code := engine.process.poll()) is None:
                continue
            how = f"engine {engine.number} ended with code {code} ({engine.log})"
            if engine.restarts < RESTARTS:
                engine.restarts += 1
                log.warning("%s; it is started again, and what it had not answered is asked again", how)
                self._start(engine)
            else:
                engine.failed = True
                log.warning("%s for the last time; the others go on", how)
        if self._local and all(engine.failed for engine in self._local):
            raise UserError(f"{self.folder}: every engine of this machine died {RESTARTS + 1} times; see engine-*.log")

    def describe(self) -> dict[str, Any]:
        """Of any of the engines, which are all alike. Waits until one has started."""
        while not (self.folder / DESCRIPTION).exists():
            self._watch()
            time.sleep(POLL_SECONDS)
        return dict(read_json(self.folder / DESCRIPTION))

    def close(self) -> None:
        """End the engines of this machine; those elsewhere see that nothing is left. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        (self.folder / WORK).unlink(missing_ok=True)
        for engine in self._local:
            if engine.process is None:
                continue
            assert engine.process.stdin is not None
            if not self._answered:  # what it is asking now is not wanted any more
                engine.process.terminate()
            try:
                engine.process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                engine.process.kill()
                engine.process.wait()
            engine.process.stdin.close()
        self._lock.close()
        if self._answered:  # the evaluation has stored them
            shutil.rmtree(self.folder, ignore_errors=True)


def _environments(sampler: str, options: SamplerOptions, count: int) -> list[dict[str, str]]:
    each = engine_gpus(options.extra, "evaluation.engine") if sampler == "vllm" else 1
    gpus = visible_gpus()
    if gpus and count * each > len(gpus):
        raise UserError(
            f"--engines: found {count}, of {each} GPU{'s' if each > 1 else ''} each, but {len(gpus)} can be used here; "
            "expected fewer engines, or a smaller evaluation.engine.tensor_parallel_size"
        )
    return [one_of(count, number, gpus, each) for number in range(count)]


def _answers(batch: Path) -> Iterator[Result]:
    try:
        yield from AnswerFiles(batch).new()
    except UserError as error:
        log.warning("nothing is taken from %s: %s", batch, error)


def _answers_all(result: Result, request: Request) -> bool:
    """Whether it is of this request, and not of one that asked for fewer answers."""
    if isinstance(request, SampleRequest):
        return isinstance(result, SampleResult) and len(result.texts) == request.n
    return isinstance(result, ScoreResult) and len(result.likelihoods) == len(request.answers)
