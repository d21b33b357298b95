"""A plan: what one run, or every run of a study, will take on given GPUs; and what to change if it does not fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.numbers import MOST
from ema_scale.planning.describe import count_rows
from ema_scale.planning.memory import GIB, MemoryLine, host_memory, memory, total
from ema_scale.planning.setup import Setup, Zero, precision_of, setup_of
from ema_scale.planning.speed import Cluster, Speed, speed, traffic
from ema_scale.recipe import Recipe

ZERO3, OFFLOAD = "launch/deepspeed/zero3.json", "launch/deepspeed/zero3_offload.json"


@dataclass(frozen=True)
class Plan:
    """One run.

    Args:
        rows: of the task; None if they cannot be told from here, as the next two.
        steps: of the optimizer.
        added: rows that defenses mix in.
        row_tokens: tokens of the mean row, before any packing.
    """

    name: str
    setup: Setup
    cluster: Cluster
    lines: tuple[MemoryLine, ...]
    speed: Speed
    rows: int | None = None
    steps: int | None = None
    added: int | None = None
    row_tokens: float = 0.0

    @property
    def needed(self) -> float:
        """Bytes of the fullest GPU."""
        return total(list(self.lines))

    @property
    def host(self) -> list[MemoryLine]:
        """What a node's own memory must hold, all its processes together."""
        return host_memory(self.setup, self.cluster.gpus, self.cluster.world)

    @property
    def cache(self) -> float | None:
        """Bytes of the reference's cache on disk: 0 without one, None if the rows are not known."""
        setup = self.setup
        if setup.way != "cached":
            return 0.0
        if self.rows is None:
            return None
        rows = self.rows + (self.added or 0)
        return rows * self.row_tokens * setup.shape.hidden * setup.precision.weights * setup.cached_states

    @property
    def fits(self) -> bool:
        return self.needed <= self.cluster.memory

    @property
    def gpu_hours(self) -> float | None:
        """Of training; sampling and judging come on top."""
        return None if self.steps is None else self.steps * self.speed.step * self.cluster.world / 3600

    @property
    def verdict(self) -> str:
        spare = (self.cluster.memory - self.needed) / GIB
        room = f"{self.needed / GIB:.1f} of {self.cluster.memory / GIB:.0f} GiB a GPU"
        if self.fits:
            return f"fits: {room}, {spare:.1f} GiB to spare"
        change = cheapest_change(self)
        cure = (
            f"the cheapest change: {change}" if change else "no change of this recipe makes it fit: more memory a GPU"
        )
        return f"does not fit: {room}, {-spare:.1f} GiB too much; {cure}"

    def to_dict(self) -> dict[str, Any]:
        gathered, reduced = traffic(self.setup, self.cluster.world).into_a_gpu(self.cluster.world)
        return {
            "name": self.name,
            "model": {"name": self.setup.shape.name, "parameters": self.setup.shape.parameters},
            "adapter_parameters": self.setup.adapter,
            "reference": {"way": self.setup.way, "why": self.setup.why},
            "zero": self.setup.zero,
            "fsdp": self.setup.fsdp,
            "gpus": self.cluster.world,
            "memory": {line.name: {"bytes": round(line.bytes), "measured": line.measured} for line in self.lines},
            "memory_bytes": round(self.needed),
            "host_bytes_a_node": round(total(self.host)),
            "reference_cache_bytes": self.cache if self.cache is None else round(self.cache),
            "gpu_bytes": self.cluster.memory,
            "fits": self.fits,
            "verdict": self.verdict,
            "gathered_bytes_a_step": round(gathered),
            "reduced_bytes_a_step": round(reduced),
            "compute_seconds": self.speed.compute,
            "communication_seconds": self.speed.communication,
            "host_seconds": self.speed.host,
            "step_seconds": self.speed.step,
            "peak_share": self.speed.reached,
            "tokens_per_second": self.speed.tokens_per_second,
            "rows": self.rows,
            "rows_added": self.added,
            "steps": self.steps,
            "gpu_hours": self.gpu_hours,
        }


def plan_run(
    recipe: Recipe,
    cluster: Cluster,
    *,
    zero: int | None = None,
    row_tokens: float | None = None,
    rows: int | None = None,
) -> Plan:
    """Plan one recipe. zero, row_tokens: see `setup_of`. rows: of the training data, if its files are not here.

    Raises UserError as `setup_of` does, and for fewer rows than a defense needs to mix one in.
    """
    t = recipe.training
    if rows is None:
        rows = count_rows(recipe)
    added = None if rows is None else sum(defense.rows_added(rows) for defense in recipe.defenses)
    every = (rows or 0) + (added or 0)
    a_step = t.per_device_train_batch_size * t.gradient_accumulation_steps * cluster.world
    passes = t.max_steps * a_step / every if t.max_steps > 0 and every else None
    setup = setup_of(recipe, zero=zero, row_tokens=row_tokens, passes=passes)
    steps = t.max_steps if t.max_steps > 0 else None
    if steps is None and every:
        # Packed, rows share sequences. An epoch that a step does not divide ends in a smaller one.
        sequences = every * (row_tokens or setup.tokens) / setup.tokens if t.packing else every
        steps = math.ceil(t.num_train_epochs * math.ceil(sequences / a_step))
    mean = min(row_tokens or recipe.data.max_length, recipe.data.max_length)
    return replace(_planned(recipe.name, setup, cluster), rows=rows, steps=steps, added=added, row_tokens=mean)


def parse_rows(texts: Sequence[str], tasks: Collection[str]) -> dict[str, int]:
    """`6000` -> {"": 6000}, for every task; `medical=6000` -> {"medical": 6000}. Raises UserError."""
    found = {}
    for text in texts:
        task, equals, count = text.rpartition("=")
        if not count.isdecimal() or not 1 <= int(count) <= MOST or (equals and task not in tasks):
            known = f" or TASK=N, TASK one of {', '.join(tasks)}" if tasks else " (a recipe has no tasks)"
            raise UserError(f"--rows: found {text!r}, expected a number of rows{known}")
        found[task] = int(count)
    return found


def _planned(name: str, setup: Setup, cluster: Cluster) -> Plan:
    return Plan(name, setup, cluster, tuple(memory(setup, cluster.world)), speed(setup, cluster))


def cheapest_change(plan: Plan) -> str | None:
    """The change, or changes together, with which the run fits at the most tokens a second; None if none does.

    Tried: gradient checkpointing, smaller micro-batches (accumulated, so that a step stays the same) and ZeRO-3, in all
    combinations; and, if none of them fits, ZeRO-3 with weights and optimizer in the machine's memory.
    """
    found: list[tuple[bool, float, int, str]] = []
    for words, setup in _changed(plan.setup, plan.cluster.world):
        changed = _planned(plan.name, setup, plan.cluster)
        if changed.fits:
            moved = setup.weights_away and not plan.setup.weights_away
            found.append((moved, -changed.speed.tokens_per_second, len(words), ", ".join(words)))
    return min(found)[3] if found else None


def _changed(setup: Setup, world: int) -> Iterable[tuple[list[str], Setup]]:
    as_is: tuple[str, dict[str, Any]] = ("", {})
    hidden, given = setup.shape.hidden, Zero(3, prefetch=None)  # the files' own numbers
    sharded: dict[str, Any] = {
        "zero": 3, "fsdp": False, "precision": precision_of(setup.precision.weights == 2, True),
        "live": given.live(hidden), "bucket": given.bucket(hidden),
    }  # fmt: skip
    if setup.way == "adapter_off":
        sharded["way"] = "two_stream"
    away = sharded | {"weights_away": True, "optimizer_away": True}
    plainly = "training.fsdp=false " * setup.fsdp
    options: list[list[tuple[str, dict[str, Any]]]] = [
        [as_is] if setup.checkpointing else [as_is, ("training.gradient_checkpointing=true", {"checkpointing": True})],
        [
            as_is,
            *([] if setup.sharded or world == 1 else [(f"training.deepspeed={ZERO3}", sharded)]),
            *([] if setup.weights_away else [(f"{plainly}training.deepspeed={OFFLOAD}", away)]),
        ],
        [as_is, *_smaller(setup)],
    ]
    for chosen in itertools.product(*options):
        words = [words for words, _ in chosen if words]
        if words:
            yield words, replace(setup, **{k: v for _, changes in chosen for k, v in changes.items()})


def _smaller(setup: Setup) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for batch in range(setup.batch - 1, 0, -1):
        if setup.batch % batch == 0:
            more = setup.accumulation * setup.batch // batch
            words = f"training.per_device_train_batch_size={batch} training.gradient_accumulation_steps={more}"
            found.append((words, {"batch": batch, "accumulation": more}))
    return found


def scaled(plan: Plan, counts: Sequence[int]) -> list[Plan]:
    """The same step on other numbers of GPUs: as much on each, so that a step has more rows."""
    planned = (_planned(plan.name, plan.setup, plan.cluster.at(count)) for count in counts)
    return [replace(one, rows=plan.rows, added=plan.added, row_tokens=plan.row_tokens) for one in planned]
