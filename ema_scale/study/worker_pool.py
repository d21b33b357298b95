"""Train many runs on this machine: one after another, or with several workers, one per GPU.

A failed run is retried once all others have had their turn.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any

from ema_scale.core.devices import one_of, visible_gpus
from ema_scale.core.errors import UserError
from ema_scale.core.io import open_append
from ema_scale.core.run_dir import RunDir
from ema_scale.core.terminal import start_logging
from ema_scale.core.uri import locate
from ema_scale.recipe import Recipe, build_recipe
from ema_scale.training.resume_check import is_finished

log = logging.getLogger(__name__)
_KILLED = "its worker process was killed from outside: out of memory?"


def train_all(
    recipes: Sequence[Recipe],
    jobs: int = 1,
    logs: Path | None = None,
    retries: int = 0,
    on_trained: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Train each recipe into its run folder; returns why runs failed, by name: {} if all finished.

    jobs: workers. With GPUs each sees one of them, in turn; without, each gets its share of the threads. What a worker
    says goes to `logs`/worker-<n>.log. retries: how often a run that fails is tried again, from its newest checkpoint.
    A failure is logged and kept in the run's status; the other runs go on. on_trained: is called after each run.
    """
    # Finished runs are nothing to start workers for.
    done = [r for r in recipes if is_finished(r, RunDir(r.run_path))]
    waiting = [r for r in recipes if r not in done]
    failed = _told(chain(_in_turn(done), _side_by_side(waiting, jobs, logs)), len(recipes), on_trained)
    for retry in range(1, retries + 1):
        again = [r for r in waiting if r.name in failed]
        if again:
            log.info("once more, those that failed (retry %d of %d)", retry, retries)
            failed = _told(_side_by_side(again, jobs, logs), len(again), on_trained)
    return failed


def listed(failed: Mapping[str, str]) -> str:
    """Runs that failed with their reasons, one below the other."""
    return "\n".join(textwrap.indent(f"{name}: {reason}", "  ") for name, reason in failed.items())


def default_jobs() -> int:
    """One worker for each GPU that this process may use, else one."""
    import torch

    return max(1, torch.cuda.device_count())


def _told(outcomes: Iterator[tuple[Recipe, str | None]], total: int, on_trained: Callable[[], None]) -> dict[str, str]:
    failed = {}
    for number, (recipe, error) in enumerate(outcomes, start=1):
        if error is not None:
            failed[recipe.name] = error
        log.info("[%d/%d] %s: %s", number, total, recipe.name, "FAILED: " + error if error else "finished")
        on_trained()
    return failed


def _side_by_side(recipes: Sequence[Recipe], jobs: int, logs: Path | None) -> Iterator[tuple[Recipe, str | None]]:
    # Even one run gets a worker, where there are any: what kills it must not kill the study.
    return _by_workers(recipes, min(jobs, len(recipes)), logs) if jobs > 1 else _in_turn(recipes)


def _in_turn(recipes: Sequence[Recipe]) -> Iterator[tuple[Recipe, str | None]]:
    for recipe in recipes:
        yield recipe, _train(recipe)


def _by_workers(recipes: Sequence[Recipe], jobs: int, logs: Path | None) -> Iterator[tuple[Recipe, str | None]]:
    if logs is not None:  # a worker that cannot open its log would end like one that was killed
        for number in range(jobs):
            with open_append(_log(logs, number)):
                pass
    for model in dict.fromkeys(recipe.model.path for recipe in recipes):
        # A world that is built shows its progress here, not in a worker's log. If it fails, the runs say why.
        with contextlib.suppress(UserError):
            locate(model)
    context = multiprocessing.get_context("spawn")
    waiting = {recipe.name: recipe for recipe in recipes}
    while waiting:
        began = time.time()
        numbers = context.Queue()
        for number in range(jobs):
            numbers.put(number)
        arguments = (numbers, jobs, visible_gpus(), str(logs) if logs else None)
        with ProcessPoolExecutor(jobs, context, _start_worker, arguments) as pool:
            futures: dict[Future[str | None], Recipe] = {
                pool.submit(_train_plain, recipe.to_dict()): recipe for recipe in waiting.values()
            }
            try:
                for done in as_completed(futures):
                    if not isinstance(done.exception(), BrokenProcessPool):
                        yield waiting.pop(futures[done].name), done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        # A worker that is killed takes the others with it; the runs that none of them had begun get new ones.
        for recipe in [r for r in waiting.values() if _interrupted(r, began)] or list(waiting.values()):
            yield waiting.pop(recipe.name), _KILLED


def _interrupted(recipe: Recipe, began: float) -> bool:
    """Whether it was begun since then and did not end; if so, its status says why."""
    run = RunDir(recipe.run_path)
    status = run.status()
    if status.state != "running" or status.updated < began:
        return False
    run.set_status("failed", keep=True, reason=_KILLED)
    return True


def _start_worker(numbers: Any, jobs: int, gpus: list[str], logs: str | None) -> None:
    # Before torch is imported: it reads both variables once.
    number = numbers.get()
    os.environ.update(one_of(jobs, number, gpus))
    if logs is not None:
        with open_append(_log(Path(logs), number)) as said:
            os.dup2(said.fileno(), sys.stdout.fileno())
            os.dup2(said.fileno(), sys.stderr.fileno())
    start_logging()


def _log(folder: Path, number: int) -> Path:
    return folder / f"worker-{number}.log"


def _train_plain(values: dict[str, Any]) -> str | None:
    return _train(build_recipe(values))


def _train(recipe: Recipe) -> str | None:
    """What went wrong, in words; None if the run finished."""
    from ema_scale.training.run import train

    try:
        train(recipe, RunDir(recipe.run_path))
    except UserError as error:
        return str(error)
    except Exception as error:  # a fault of one run is no reason to lose the others
        log.exception("run %s", recipe.name)
        return f"{type(error).__name__}: {error}"
    return None
