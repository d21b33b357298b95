"""`reference: auto`: choose the cheapest exact way to run the reference, and say why."""

from __future__ import annotations

from dataclasses import dataclass

WORTH_CACHING = 1.5  # how often training must see a row for a cache to pay
BASE, START = "the base model", "the adapter that training goes on from"


@dataclass(frozen=True)
class ReferenceStrategy:
    """way: one of WAYS other than auto, or separate.
    why: a clause for people.
    of: which model the reference is.
    """

    way: str
    why: str
    of: str = BASE

    def __str__(self) -> str:
        return f"{self.of}, by {self.way}: {self.why}"


@dataclass(frozen=True)
class Cost:
    """Of a cache: bytes that it still lacks, and bytes free on its disk."""

    missing: int
    free: int


def choose_strategy(
    *, needed: bool, sharded: bool, passes: float, cost: Cost | None = None, problem: str | None = None
) -> ReferenceStrategy:
    """The cheapest exact way.

    A cache costs one forward per row, and saves one whenever training sees the row. It may take half of the free disk.

    needed: whether any defense reads the reference.
    sharded: whether ZeRO-3 or FSDP2 shards the model.
    passes: how often training sees a row.
    cost: of a cache; None if it is not known yet.
    problem: why there can be no cache, as a clause; None if there can.
    """
    live = ReferenceStrategy("two_stream", "each layer is gathered once for policy and reference")
    if not sharded:
        live = ReferenceStrategy("adapter_off", "a second forward of the same weights, no second model")
    if not needed:
        return ReferenceStrategy(live.way, "no defense needs it; drift readings use it")
    if cost is not None and cost.missing == 0:
        return ReferenceStrategy("cached", "every row's reference is on disk already")
    if passes < WORTH_CACHING:
        return ReferenceStrategy(live.way, f"{live.why}; rows are seen {passes:.2g} times, so a cache would not pay")
    if problem is not None:
        return ReferenceStrategy(live.way, f"{live.why}; no cache, since {problem}")
    if cost is not None and cost.missing > cost.free / 2:
        sizes = f"{cost.missing / 1e9:.2g} GB, {cost.free / 1e9:.2g} GB are free"
        return ReferenceStrategy(live.way, f"{live.why}; a cache would take more than half of the free disk ({sizes})")
    return ReferenceStrategy("cached", f"rows are seen {passes:.2g} times, their reference is computed once")
