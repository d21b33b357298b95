"""Work for several engines in one folder: requests in chunks that engines claim, answers in a file per engine.

    work.json                what serves them: sampler and options; it is there while somebody waits for answers
    <batch>/chunks.jsonl     the requests, a chunk per line, written before work.json names the batch
    <batch>/<chunk>.lock     held by the engine that asks the chunk; the system releases it if that engine dies
    <batch>/<chunk>.done     all of the chunk's answers are on the disk
    <batch>/<engine>.jsonl   what that engine answered, appended as it comes
    <engine>.error           why an engine gave up

Engines may run on any machine that shares the folder. A chunk whose engine died is claimed by another one, which asks
what has no answer yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ema_scale.core.errors import UserError
from ema_scale.core.files import MissingFile, parse_json, read_json
from ema_scale.core.io import append_jsonl, atomic_write_json, atomic_write_text, file_lock, jsonl_text, read_jsonl
from ema_scale.inference.base import SampleRequest, SampleResult, SamplerOptions, ScoreRequest, ScoreResult

WORK = "work.json"
Request = SampleRequest | ScoreRequest
Result = SampleResult | ScoreResult
FLUSH_SECONDS = 0.5
# Answers that a chunk has at least, where there are so many: as many as vLLM writes at once.
LEAST_ANSWERS = 256


def split(requests: Sequence[Request], engines: int) -> list[list[Request]]:
    """Chunks of requests, adapter by adapter, balanced by tokens.

    Each takes a share of what is left, 1 / (2 engines) of its tokens: the first ones are large, so that engines are
    full, and the last ones small, so that all end together.
    """
    ordered = sorted(requests, key=lambda request: request.adapter or "")  # stable: questions stay in their order
    left, answers = sum(map(_tokens, ordered)), sum(map(_answers, ordered))
    least = min(LEAST_ANSWERS, answers / engines)
    chunks: list[list[Request]] = []
    target = size = count = 0.0
    for request in ordered:
        if not chunks or (size >= target and count >= least):
            chunks.append([])
            left -= size
            target, size, count = left / (2 * engines), 0.0, 0.0
        chunks[-1].append(request)
        size, count = size + _tokens(request), count + _answers(request)
    return chunks


def _answers(request: Request) -> int:
    return request.n if isinstance(request, SampleRequest) else len(request.answers)


def _tokens(request: Request) -> float:
    """A guess: the prompt is read once for its sampled answers, each of which may be as long as it may be."""
    read = sum(len(turn["content"]) for turn in request.messages) / 3
    if isinstance(request, SampleRequest):
        return read + request.n * request.max_tokens
    return sum(read + len(answer) / 3 for answer in request.answers) * (1 if request.alone is None else 2)


@dataclass(frozen=True)
class Work:
    """What engines are to serve.

    Args:
        sampler: its name, as `make_sampler` takes it.
        options: of every engine.
        batches: folders of requests, oldest first.
    """

    sampler: str
    options: SamplerOptions
    batches: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        atomic_write_json(folder / WORK, _WORK.dump_python(self, mode="json"))

    @classmethod
    def read(cls, folder: Path) -> Work | None:
        """None if nobody waits for answers."""
        try:
            return _WORK.validate_python(read_json(folder / WORK))
        except MissingFile:
            return None


_WORK = TypeAdapter(Work)
_REQUESTS: TypeAdapter[list[Request]] = TypeAdapter(list[Request])
_RESULT: TypeAdapter[Result] = TypeAdapter(Result)


def write_batch(folder: Path, chunks: Sequence[Sequence[Request]]) -> None:
    rows = ({"requests": [asdict(request) for request in chunk]} for chunk in chunks)
    atomic_write_text(folder / "chunks.jsonl", jsonl_text(rows))


def is_done(folder: Path, chunks: int) -> bool:
    """Whether every chunk of a batch has been answered."""
    return all((folder / f"{number}.done").exists() for number in range(chunks))


class Busy(UserError):
    """Another engine holds the chunk."""


class Batch:
    """The requests of one folder, as an engine sees them. engine: its name, which no other one has."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder, self.file = folder, folder / f"{engine}.jsonl"
        self._chunks = [_REQUESTS.validate_python(row["requests"]) for row in read_jsonl(folder / "chunks.jsonl")]
        self._left = set(range(len(self._chunks)))

    @contextlib.contextmanager
    def claim(self) -> Iterator[list[Request] | None]:
        """What is not answered of a chunk that nobody asks; None if there is none now. Call `finish` when it is."""
        with contextlib.ExitStack() as stack:
            for number in sorted(self._left):
                if (self.folder / f"{number}.done").exists():
                    self._left.discard(number)
                    continue
                lock = self.folder / f"{number}.lock"
                touched = lock.exists()
                try:
                    stack.enter_context(file_lock(lock, Busy(f"{lock}: held")))
                except Busy:
                    continue
                if (self.folder / f"{number}.done").exists():  # since we looked
                    self._left.discard(number)
                    stack.pop_all().close()
                    continue
                answered = {result.key for result in AnswerFiles(self.folder).new()} if touched else set()
                yield [request for request in self._chunks[number] if request.key not in answered]
                (self.folder / f"{number}.done").touch()
                self._left.discard(number)
                return
            yield None

    def append(self, results: Iterator[Result]) -> None:
        """Write down results as they come: at once if half a second has passed since the last time."""
        pending: list[dict[str, Any]] = []
        since = time.monotonic()
        try:
            for result in results:
                pending.append(_result_row(result))
                if time.monotonic() - since > FLUSH_SECONDS:
                    append_jsonl(self.file, pending)
                    pending, since = [], time.monotonic()
        finally:
            if pending:
                append_jsonl(self.file, pending)


class AnswerFiles:
    """Reads what the engines of a folder have answered, each line once. A last line that is not whole yet waits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, int] = {}

    def new(self) -> Iterator[Result]:
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.name == "chunks.jsonl":
                continue
            with path.open("rb") as opened:
                opened.seek(self._read.get(path, 0))
                whole = opened.read().rpartition(b"\n")[0]
            if whole:
                self._read[path] = self._read.get(path, 0) + len(whole) + 1
                for line in whole.split(b"\n"):
                    yield _RESULT.validate_python(parse_json(line, str(path)))


def _result_row(result: Result) -> dict[str, Any]:
    row = asdict(result)
    for one in row.get("likelihoods", ()):
        # As text: a likelihood that is no finite number has no JSON, and is refused with its question later.
        one |= {"total": str(one["total"]), "alone": None if one["alone"] is None else str(one["alone"])}
    return row
