"""The worker of `ema bench reference`: one way to train, on every process that torchrun started, under ZeRO-3 or
FSDP2.

torchrun --nproc_per_node 2 -m ema_scale.bench.gathered RESULT.json WAY TASK
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_scale.bench.harness import peak_rss, reset_peak_rss
from ema_scale.bench.training_ways import WARMUP, Task, train
from ema_scale.reference.sharding import uses_fsdp
from ema_scale.rundir import atomic_write_json
from ema_scale.training.distributed import is_main, prepare_environment


class Gathers:
    """Counts what DeepSpeed's backend, or FSDP2, gathers on this process: calls, and bytes of what comes out."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        self.steps: list[tuple[int, int]] = []

    def install(self) -> None:
        """After DeepSpeed has made its backend."""
        if uses_fsdp():
            import torch.distributed as dist
            import torch.distributed._functional_collectives as functional

            # FSDP2 gathers groups by the first, which fills a tensor; `full_tensor` by the second, which returns one.
            dist.all_gather_single = self._counted(dist.all_gather_single)
            functional.all_gather_single = self._counted(functional.all_gather_single, returned=True)
            return
        import deepspeed.comm.comm as comm

        for name in ("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced"):
            setattr(comm.cdb, name, self._counted(getattr(comm.cdb, name)))

    def _counted(self, gather: Any, returned: bool = False) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            done = gather(*args, **kwargs)
            out = done
            if not returned:  # it comes first: a tensor, or a list of them
                out = args[0] if args else next(v for k, v in kwargs.items() if k.startswith(("output", "tensor_list")))
            self.calls += 1
            self.bytes += sum(t.nbytes for t in ([out] if isinstance(out, Tensor) else out))
            return done

        return counted

    def step(self) -> None:
        self.steps.append((self.calls, self.bytes))

    def a_step(self) -> tuple[float, float]:
        """Median calls and bytes of a step after the warm-up, whose first checks what the others need not."""
        timed = list(zip(self.steps[WARMUP - 1 :], self.steps[WARMUP:], strict=False))
        calls, moved = ([b[i] - a[i] for a, b in timed] for i in (0, 1))
        return statistics.median(calls), statistics.median(moved)


def main(result: str, way: str, given: str) -> None:
    task = Task(**json.loads(given))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    prepare_environment(task.deepspeed, task.fsdp)
    gathers, cuda = Gathers(), task.device == "cuda"
    before = 0

    def began() -> None:
        nonlocal before
        gathers.install()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak_rss()

    if not cuda:
        reset_peak_rss()
        before = peak_rss()
    done = train(way, task, began, gathers.step)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss() - before
    calls, moved = gathers.a_step()
    if is_main():
        found = {"seconds": done.seconds, "losses": done.losses, "calls": calls, "bytes": moved, "peak_bytes": peak}
        atomic_write_json(Path(result), found | {"reference": done.reference})


if __name__ == "__main__":
    main(*sys.argv[1:])
