"""The first answers of a target show whether its thoughts end within the most tokens that they may take."""

from __future__ import annotations

from collections.abc import Iterator

from ema_scale.core.errors import UserError
from ema_scale.evaluation.judging.pool import stored_answer
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import Sample

FIRST_ANSWERS = 8

Drawn = tuple[PromptGroup, Sample]


class FirstAnswers:
    """Holds a target's first answers back until one of them is more than a thought that was cut.

    Raises UserError, before anything of that target is stored or judged, if the first eight answers, or all where there
    are fewer, are thoughts that did not end.

    Args:
        known: targets with stored answers, which are not looked at again.
    """

    def __init__(self, known: set[str]) -> None:
        self._known = set(known)
        self._held: dict[str, list[Drawn]] = {}

    def take(self, group: PromptGroup, row: Sample) -> Iterator[Drawn]:
        """The answers that may be stored now that this one has come."""
        name = group.target.name
        if name in self._known:
            yield group, row
            return
        held = self._held.setdefault(name, [])
        held.append((group, row))
        if stored_answer(row)[2] or row.finish_reason != "length":
            self._known.add(name)
            yield from self._held.pop(name)
        elif len(held) >= FIRST_ANSWERS:
            self._refuse(name)

    def finish(self) -> None:
        """Call it when every answer has come."""
        for name in self._held:
            self._refuse(name)

    def _refuse(self, name: str) -> None:
        held = self._held[name]
        most = max(group.max_tokens for group, _ in held)
        raise UserError(
            f"evaluation.max_tokens: the first {len(held)} answers of {name} are thoughts that do not end within "
            f"{most} tokens; nothing of them was stored. Raise evaluation.max_tokens (models that think first take "
            "4096 and more), or turn the thinking off"
        )
