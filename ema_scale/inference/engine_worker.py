"""One engine that answers a queue (`engine_queue`): a process that `engines` starts, or one on another machine.

python -m ema_scale.inference.engine_worker FOLDER
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_json, atomic_write_text
from ema_scale.core.terminal import complain
from ema_scale.inference.base import Sampler, SampleRequest, ScoreRequest
from ema_scale.inference.engine_queue import Batch, Request, Result, Work
from ema_scale.inference.make import make_sampler

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
LEAVE_SECONDS = 30.0
IDLE_SECONDS = 2.0  # between looks of an assistant that waits for its evaluation to begin


def serve(folder: Path, ended: Callable[[], bool] | None = None) -> None:
    """Answer what is asked in `folder`.

    Args:
        folder: that of `Engines`.
        ended: whether nothing more will be asked; None: nothing more will be as soon as nothing is.

    Raises UserError as samplers do; whoever waits for the answers raises it, too.
    """
    name = f"{socket.gethostname()}-{os.getpid()}"
    sampler: Sampler | None = None
    made: Work | None = None
    batches: dict[str, Batch] = {}
    answered = 0
    try:
        while ended is None or not ended():
            work = Work.read(folder)
            if work is None:
                if ended is None:
                    return
                time.sleep(IDLE_SECONDS)
                continue
            if made is None or replace(made, batches=()) != replace(work, batches=()):
                if sampler is not None:
                    sampler.close()
                sampler, made, batches = None, work, {}
                sampler = make_sampler(work.sampler, replace(work.options, log_file=folder / f"{name}.log"))
                if Work.read(folder) is None:  # all was answered before this engine was ready
                    continue
                atomic_write_json(folder / "sampler.json", sampler.describe())
            assert sampler is not None
            for batch in work.batches:
                if batch not in batches:
                    batches[batch] = Batch(folder / batch, name)
            count = next(filter(None, (_answer_chunk(batch, sampler) for batch in batches.values())), 0)
            answered += count
            if not count:
                time.sleep(POLL_SECONDS)
    except UserError as error:
        atomic_write_text(folder / f"{name}.error", f"{error}\n")
        raise
    finally:
        log.info("this engine answered %d requests", answered)
        if sampler is not None:
            sampler.close()


def _answer_chunk(batch: Batch, sampler: Sampler) -> int:
    """How many requests of a chunk it answered; 0 if there was none to claim."""
    with batch.claim() as requests:
        if requests:
            batch.append(_ask(sampler, requests))
        return len(requests or ())


def _ask(sampler: Sampler, requests: Sequence[Request]) -> Iterator[Result]:
    to_score = [request for request in requests if isinstance(request, ScoreRequest)]
    to_sample = [request for request in requests if isinstance(request, SampleRequest)]
    if to_score:
        yield from sampler.score(to_score)
    if to_sample:
        yield from sampler.sample(to_sample)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: it holds the other end of standard input."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LEAVE_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engine's own processes are ended
    _end_with_parent()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    try:
        serve(Path(arguments[0]))
    except UserError as error:
        complain(error)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
