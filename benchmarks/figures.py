"""How fast and how large: the fused loss beside torch's and Liger's, and a training step by every way to run the
reference. Each function is a section of `gpu.py`."""

from __future__ import annotations

import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.elementwise import by_triton, formula, loss_by
from benchmarks.harness import Variant, compare, peak_bytes
from benchmarks.loss import OURS, VARIANTS, Problem, Shape, errors, missing, run
from benchmarks.plan import setup_of_task
from benchmarks.report import Rows
from benchmarks.sizes import Sizes
from benchmarks.step import operations
from benchmarks.training_variants import CACHED, FORWARDS, OFF, PLAIN, PLAIN_LOGITS, TWO, Task, train
from ema_scale.models.flops import peak_flops
from ema_scale.planning.memory import memory, total

COMPILED, KERNEL = "candidate: torch.compile", "candidate: a Triton kernel"
STEP_WAYS = (PLAIN, OFF, TWO, CACHED)
FIELD = (PLAIN_LOGITS, FORWARDS)  # the field's, with full logits: for comparison, with checkpointing alone


def ceilings(rows: Rows, sizes: Sizes) -> None:
    """What the device reaches with one large copy, and with one large product of random bfloat16 matrices."""
    large = sizes.device == "cuda"
    with rows.row("copy, TB/s (read and written)") as found:
        source = torch.randn(2**30 if large else 2**16, device=sizes.device)
        target = torch.empty_like(source)
        found["value"] = 2 * source.nbytes / _timed(functools.partial(target.copy_, source), sizes) / 1e12
    del source, target
    with rows.row("bfloat16 product, TFLOP/s") as found:
        found["value"] = product_rate(sizes) / 1e12
    with rows.row("by data sheet, bfloat16 TFLOP/s") as found:
        known = peak_flops(torch.cuda.get_device_name()) if large else None
        found["value"] = known and known / 1e12


def product_rate(sizes: Sizes) -> float:
    """Operations per second of one large product of bfloat16 matrices."""
    n = 8192 if sizes.device == "cuda" else 64
    a, b = (torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _timed(lambda: a @ b, sizes)


def _timed(what: Callable[[], Any], sizes: Sizes) -> float:
    """Median seconds of one call."""
    wait = torch.cuda.synchronize if sizes.device == "cuda" else lambda: None
    found = []
    for turn in range(13 if sizes.device == "cuda" else 2):
        wait()
        began = time.perf_counter()
        what()
        wait()
        if turn >= 3 or sizes.device == "cpu":
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def loss(rows: Rows, sizes: Sizes) -> None:
    """Loss and gradient of all tokens: cross-entropy + 0.1 KL(policy, reference), and cross-entropy alone.

    arithmetic: seconds that its products take at the measured rate: the policy's logits and the gradient, for a
    divergence the reference's logits too.
    """
    torch._dynamo.config.cache_size_limit = 32
    # In a rehearsal without its compiler, which takes a CPU half a minute.
    compiled = torch.compile(formula, dynamic=False, backend="inductor" if sizes.device == "cuda" else "eager")
    VARIANTS[COMPILED] = loss_by(compiled)
    VARIANTS[KERNEL] = loss_by(by_triton)
    rate = product_rate(sizes)
    for name, (tokens, vocabulary, hidden) in sizes.losses.items():
        shape = Shape(tokens, vocabulary, hidden, "bfloat16" if sizes.device == "cuda" else "float32")
        shape = replace(shape, device=sizes.device)
        both = Problem.of(shape)
        for what, problem, products in (("CE + KL", both, 3), ("CE", replace(both, soft=0.0), 2)):
            arithmetic = 2 * products * tokens * vocabulary * hidden / rate
            _loss_table(rows, f"{name}, {what}", shape, problem, arithmetic, sizes)
        del both, problem
        gc.collect()


def _loss_table(rows: Rows, title: str, shape: Shape, problem: Problem, arithmetic: float, sizes: Sizes) -> None:
    alive: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for way in VARIANTS:
        note = missing(way, shape)
        if way == KERNEL and shape.device == "cpu":
            note = "needs a GPU: Triton kernels do not run on a CPU"
        if note:
            rows.add(f"{title}: {way}", error=note)
            continue
        found: dict[str, Any] = {}
        try:
            found["off"] = max(errors(way, problem.first(min(128, shape.tokens)))[:2])
            call = functools.partial(_once, way, problem)
            call()
            found["memory"] = peak_bytes(call)
            alive[way], facts[way] = call, found
        except Exception as error:  # one way must not end the others
            rows.add(f"{title}: {way}", error=f"{type(error).__name__}: {error}"[-2000:])
        _free()
    measured = compare(
        [Variant(way, call) for way, call in alive.items()], baseline=OURS, repeats=sizes.repeats, memory=False
    )
    for one in measured:
        if one.median is None:
            rows.add(f"{title}: {one.name}", error=one.note)
            continue
        low, high = min(one.seconds), max(one.seconds)
        rows.add(
            f"{title}: {one.name}", seconds=one.median, low=low, high=high, ratio=one.ratio, arithmetic=arithmetic,
            **facts[one.name],
        )  # fmt: skip


def _once(way: str, problem: Problem) -> None:
    run(way, problem)


def step(rows: Rows, sizes: Sizes, name: str) -> None:
    """One model's steps: plain, and KL by every way to run the reference, with and without checkpointing."""
    task = sizes.steps[name]
    rate = product_rate(sizes)
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        os.environ["EMA_CACHE"] = folder
        for checkpointing, ways in ((True, STEP_WAYS), (False, STEP_WAYS), (True, FIELD)):
            case = replace(task, checkpointing=checkpointing)
            floors = {way: operations(way, case) for way in ways}
            for way in ways:
                label = f"{way}, {'checkpointing' if checkpointing else 'activations stored'}"
                with rows.row(label) as found:
                    found["model"] = task.model
                    found |= _step(way, case, floors[way], rate)
                _free()


def _step(way: str, task: Task, operations_: dict[str, float], rate: float) -> dict[str, Any]:
    used = 0
    cuda = task.device == "cuda"

    def ended() -> None:
        nonlocal used
        if cuda:
            free, whole = torch.cuda.mem_get_info()
            used = max(used, whole - free)

    if cuda:
        torch.cuda.empty_cache()
    done = train(way, task, torch.cuda.reset_peak_memory_stats if cuda else lambda: None, ended)
    median, tokens = statistics.median(done.seconds), task.rows * task.length
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    found: dict[str, Any] = {
        "seconds": median,
        "low": min(done.seconds),
        "high": max(done.seconds),
        "tokens_per_second": tokens / median,
        "mfu": operations_["useful"] * tokens / median / peak if peak else None,
        "arithmetic": operations_["done"] * tokens / rate,
        "floor": operations_["done"] / operations_["plain"],
        "loss": done.losses[-1],
        "phases": {k: statistics.median(s[k] for s in done.phases) for k in (done.phases or [{}])[0]},
    }
    if cuda:
        found |= {"memory": torch.cuda.max_memory_allocated(), "used": used}
    if way in STEP_WAYS:
        lines = memory(setup_of_task(way, task), cuda=cuda)
        found["planned"] = total([line for line in lines if line.measured])
        found["planned_whole"] = total(lines)
        if cuda:
            found["plan_off"] = found["planned"] / found["memory"] - 1
            found["whole_off"] = found["planned_whole"] / found["used"] - 1
    return found


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
