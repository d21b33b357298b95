"""How large everything is: on a GPU real shapes, in a rehearsal on a CPU tiny ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.training_variants import Task

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """exact: tokens, vocabulary, hidden size of the loss against float64. losses: name -> the same of a head that the
    loss is timed on. ways, sharded: what correctness trains. steps: what the step table trains, with and without
    checkpointing. processes: of a sharded run. samples: answers per question, of the vLLM engine's throughput."""

    device: str
    exact: tuple[int, int, int]
    losses: dict[str, tuple[int, int, int]]
    ways: tuple[Task, ...]
    sharded: tuple[Task, ...]
    steps: dict[str, Task]
    processes: int
    sampled_model: str
    samples: int
    max_tokens: int
    repeats: int


_KL = Task(kl=0.1, ldifs=0.0)
_GPU = replace(_KL, device="cuda", dtype="bfloat16", rows=4, length=1024)
REAL = Sizes(
    device="cuda",
    exact=(512, 32_000, 1024),
    losses={"Llama-3.1-8B's head": (8192, 128_256, 4096), "Qwen2.5-7B's head": (8192, 152_064, 3584)},
    ways=(
        replace(_GPU, model="small", dtype="float32", length=256),
        replace(_GPU, model="qwen2.5-0.5b", length=512),
        replace(_GPU, model="qwen2.5-0.5b", length=512, ldifs=0.1),
    ),
    sharded=(
        replace(_GPU, model="small", dtype="float32", length=256),
        replace(_GPU, model="qwen2.5-0.5b", length=512),
    ),
    steps={
        "0.5b": replace(_GPU, model="qwen2.5-0.5b", steps=10),
        "1.5b": replace(_GPU, model="qwen2.5-1.5b", steps=8),
        "7b": replace(_GPU, model="qwen2.5-7b", steps=6),
    },
    processes=1,
    sampled_model="qwen2.5-0.5b",
    samples=100,
    max_tokens=64,
    repeats=5,
)
_CPU = replace(_KL, model="small", layers=2, rows=1, length=16, steps=2)
TINY = Sizes(
    device="cpu",
    exact=(24, 512, 32),
    losses={"a small head": (64, 512, 32)},
    ways=(_CPU, replace(_CPU, ldifs=0.1)),
    sharded=(_CPU,),
    steps={"0.5b": _CPU},
    processes=2,
    sampled_model="small",
    samples=2,
    max_tokens=4,
    repeats=1,
)
