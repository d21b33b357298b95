"""Looking at an evaluation while it runs: targets that are sampled and judged before others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from ema_scale.evaluation.records import SUMMARY_FILE, Summary
from ema_scale.evaluation.remaining import Remaining


class Watch(Protocol):
    """Who looks at an evaluation while it runs."""

    def wants(self) -> bool:
        """Whether it would look now, if there were something new."""
        ...

    def look(self) -> None:
        """Summaries of adapters are new since the last look. There are targets left."""
        ...


class Unwatched:
    """Nobody looks."""

    def wants(self) -> bool:
        return False

    def look(self) -> None: ...


class TargetsInTurn:
    """Tells a watch of adapters that are done, in the order in which their last answers were drawn.

    Args:
        remaining: all targets of which something is missing.
        write_summary: of one of them; returns it.
    """

    def __init__(
        self, remaining: Iterable[Remaining], watch: Watch, write_summary: Callable[[Remaining], Summary]
    ) -> None:
        self._watch, self._write_summary = watch, write_summary
        self._targets = {left.target.name: left for left in remaining}
        self._undrawn = {name: left.unsampled for name, left in self._targets.items()}
        self._drawn = deque(left for left in self._targets.values() if not left.unsampled)
        self._left = len(self._targets)
        self._summaries: dict[str, Summary] = {}

    def drew(self, name: str) -> None:
        """An answer of this target was drawn and stored."""
        self._undrawn[name] -= 1
        if self._undrawn[name] > 0:
            return
        self._drawn.append(self._targets[name])
        if self._targets[name].target.adapter_path is None or not self._watch.wants():
            return
        done = []
        while self._drawn and next(self._drawn[0].unjudged_keys(), None) is None:
            done.append(self._drawn.popleft())
        self._left -= len(done)
        if done and self._left:
            self._summaries |= {left.target.name: self._write_summary(left) for left in done}
            self._watch.look()

    def summary(self, name: str, sampler: dict[str, Any], seconds: float) -> Summary | None:
        """That of a target that was done early, written again with what is known at the end; None for any other.

        sampler: its description.
        seconds: of the whole evaluation.
        """
        if (early := self._summaries.get(name)) is None:
            return None
        last = early.model_copy(update={"sampler": early.sampler | sampler, "seconds": round(seconds, 3)})
        last.write(Path(self._targets[name].target.out_dir) / SUMMARY_FILE)
        return last
