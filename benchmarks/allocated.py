"""The most memory that a step of training takes, in one process or on every one that torchrun started.

torchrun --nproc_per_node 2 -m benchmarks.allocated RESULT.json WAY TASK
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import peak_rss, reset_peak_rss
from benchmarks.training_ways import WARMUP, Task, train
from ema_scale.core.io import atomic_write_json
from ema_scale.training.distributed import is_main, prepare_environment


def allocated(way: str, task: dict[str, Any], cache: str) -> dict[str, Any]:
    """One way alone in its process: the most bytes of torch's allocator in the steps after the warm-up."""
    os.environ["EMA_CACHE"] = cache
    asked = Task(**task)
    if asked.device == "cuda":
        done = train(way, asked, torch.cuda.reset_peak_memory_stats)
        return {"bytes": torch.cuda.max_memory_allocated(), "seconds": done.seconds}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    held, steps = 0, 0

    def ended() -> None:
        nonlocal held, steps
        steps += 1
        if steps == WARMUP:
            held = held_bytes()
            profiler.start()
        elif steps == WARMUP + asked.steps:
            profiler.stop()

    done = train(way, asked, ended=ended)
    now = highest = 0
    for change in changes(profiler):
        now += change
        highest = max(highest, now)
    return {"bytes": held + highest, "seconds": done.seconds}


def changes(profiler: Any) -> Iterator[int]:
    """Bytes given out (taken back: negative) by the CPU's allocator, in the order of time."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        yield event.nbytes()


def held_bytes() -> int:
    """Of all tensors that are alive, by the storages they share."""
    import gc

    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    # A DTensor's own storage is none: its part is a tensor among the others.
    storages = [t.untyped_storage() for t in tensors if not hasattr(t, "full_tensor")]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def resident(way: str, task: Task) -> dict[str, Any]:
    """One way on one of several processes: the bytes of tensors after the warm-up, and by how much the process grows
    beyond that in a step.

    Not by the allocator's events: the threads of a collective give back what the profiler has seen given out, and
    it does not see that.
    """
    if task.device == "cuda":
        done = train(way, task, torch.cuda.reset_peak_memory_stats)
        return {"bytes": torch.cuda.max_memory_allocated(), "seconds": done.seconds}
    held = before = steps = 0

    def ended() -> None:
        nonlocal held, before, steps
        steps += 1
        if steps == WARMUP:
            held = held_bytes()
            reset_peak_rss()
            before = peak_rss()

    done = train(way, task, ended=ended)
    return {"bytes": held + peak_rss() - before, "seconds": done.seconds}


def main(result: str, way: str, given: str) -> None:
    task = Task(**json.loads(given))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    prepare_environment(task.deepspeed, task.fsdp)
    found = resident(way, task)
    if is_main():
        atomic_write_json(Path(result), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
