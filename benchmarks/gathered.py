"""The worker of `ema bench reference`: trains one variant under ZeRO, FSDP2 or DDP and counts the bytes it moves."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import peak_rss, reset_peak_rss
from benchmarks.training_variants import WARMUP, Task, train
from ema_scale.models.sharding import uses_fsdp
from ema_scale.training.distributed import prepare_environment, uses_deepspeed


@dataclass(frozen=True)
class Communication:
    """Communication of one process.

    Args:
        calls: calls of all-gather.
        gathered: bytes that all-gather puts out.
        reduced: bytes of gradients that go into reduce-scatter, reduce and all-reduce.
    """

    calls: float = 0
    gathered: float = 0
    reduced: float = 0


class Traffic:
    """Counts what DeepSpeed, FSDP2 or DDP moves on this process.

    torch's CommDebugMode would count calls, but not bytes, and sees neither DeepSpeed's collectives nor DDP's.
    """

    def __init__(self) -> None:
        self.calls = self.gathered = self.reduced = 0
        self.steps: list[Communication] = []
        _hook_ddp(self._reduces)

    def install(self) -> None:
        """Replace the collectives by counting ones. DeepSpeed's backend must exist."""
        if uses_fsdp():
            import torch.distributed as dist
            import torch.distributed._functional_collectives as functional

            # FSDP2 gathers groups by the first, which fills a tensor; `full_tensor` by the second, which returns one.
            dist.all_gather_single = self._counted(dist.all_gather_single, _OUTPUT)
            functional.all_gather_single = self._counted(functional.all_gather_single, None)
            dist.reduce_scatter_single = self._counted(dist.reduce_scatter_single, _INPUT)
        elif uses_deepspeed():
            import deepspeed.comm.comm as comm

            for name in ("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced"):
                setattr(comm.cdb, name, self._counted(getattr(comm.cdb, name), _OUTPUT))
            for name in ("reduce_scatter", "reduce_scatter_tensor"):
                setattr(comm.cdb, name, self._counted(getattr(comm.cdb, name), _INPUT))
            for name in ("reduce", "all_reduce", "all_reduce_coalesced"):
                setattr(comm.cdb, name, self._counted(getattr(comm.cdb, name), _IN_PLACE))

    def _counted(self, collective: Any, read: _Read | None) -> Any:
        """`collective`, counted by the bytes of the argument that `read` returns; None: of its result, as gathered."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            done = collective(*args, **kwargs)
            if read is None or read is _OUTPUT:
                self.calls += 1
                self.gathered += _nbytes(done if read is None else read(args, kwargs))
            else:
                self._reduces(_nbytes(read(args, kwargs)))
            return done

        return counted

    def _reduces(self, size: int) -> None:
        self.reduced += size

    def step(self) -> None:
        self.steps.append(Communication(self.calls, self.gathered, self.reduced))

    def per_step(self) -> Communication:
        """Medians of the steps after the warm-up; the first of them makes checks that others do not."""
        timed = list(zip(self.steps[WARMUP - 1 :], self.steps[WARMUP:], strict=False))
        names = [field.name for field in fields(Communication)]
        return Communication(*(statistics.median(getattr(b, n) - getattr(a, n) for a, b in timed) for n in names))


_Read = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _argument(position: int, *names: str) -> _Read:
    """Reads a collective's argument, by position or by the beginning of its name."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[position] if len(args) > position else next(v for k, v in kwargs.items() if k.startswith(names))

    return read


_OUTPUT, _INPUT, _IN_PLACE = _argument(0, "output", "tensor_list"), _argument(1, "input"), _argument(0, "tensor")


def _nbytes(tensors: Tensor | Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in ([tensors] if isinstance(tensors, Tensor) else tensors))


def _hook_ddp(reduces: Callable[[int], None]) -> None:
    """Count DDP's reductions: they run in C++, and a communication hook sees each bucket."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    made = DistributedDataParallel.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)

        def hook(group: Any, bucket: Any) -> Any:
            reduces(bucket.buffer().nbytes)
            return allreduce_hook(group, bucket)

        self.register_comm_hook(None, lambda group, bucket: hook(group, bucket))  # torch reads annotations

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


def measure(variant: str, given: dict[str, Any]) -> dict[str, Any]:
    """Train `variant` of the task in all processes; bytes, calls, losses and seconds of this one."""
    task = Task(**given)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    prepare_environment(task.deepspeed, task.fsdp)
    traffic, cuda = Traffic(), task.device == "cuda"
    before = 0

    def began() -> None:
        nonlocal before
        traffic.install()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak_rss()

    if not cuda:
        reset_peak_rss()
        before = peak_rss()
    done = train(variant, task, began, traffic.step)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss() - before
    found = {"seconds": done.seconds, "losses": done.losses, "reference": done.reference, "phases": done.phases}
    return {**found, "peak_bytes": peak, **asdict(traffic.per_step())}
