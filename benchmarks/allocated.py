"""The worker of `ema bench plan`: peak memory of a training step, in one process or in each of several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import peak_rss, reset_peak_rss
from benchmarks.training_variants import WARMUP, Task, train
from ema_scale.training.distributed import prepare_environment


def allocated(variant: str, task: dict[str, Any], cache: str) -> dict[str, Any]:
    """Peak bytes of torch's allocator in the steps after the warm-up; the variant has this process to itself."""
    os.environ["EMA_CACHE"] = cache
    asked = Task(**task)
    if asked.device == "cuda":
        done = train(variant, asked, torch.cuda.reset_peak_memory_stats)
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

    done = train(variant, asked, ended=ended)
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
    """Bytes of all live tensors; storage that several share counts once."""
    import gc

    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    # A DTensor's own storage is none: its part is a tensor among the others.
    storages = [t.untyped_storage() for t in tensors if not hasattr(t, "full_tensor")]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def resident(variant: str, task: Task) -> dict[str, Any]:
    """Peak bytes of one process among several: live tensors after the warm-up, plus its growth in a step.

    The allocator's events would not do: a collective's threads free memory, and the profiler does not see that.
    """
    if task.device == "cuda":
        done = train(variant, task, torch.cuda.reset_peak_memory_stats)
        return {"bytes": torch.cuda.max_memory_allocated(), "seconds": done.seconds}
    held = before = steps = 0

    def ended() -> None:
        nonlocal held, before, steps
        steps += 1
        if steps == WARMUP:
            held = held_bytes()
            reset_peak_rss()
            before = peak_rss()

    done = train(variant, task, ended=ended)
    return {"bytes": held + peak_rss() - before, "seconds": done.seconds}


def measure(variant: str, given: dict[str, Any]) -> dict[str, Any]:
    """As `allocated`, in each of several processes: peak bytes of this one."""
    task = Task(**given)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    prepare_environment(task.deepspeed, task.fsdp)
    return resident(variant, task)
