"""Early stopping: end the training when the model has moved too far, or misaligned answers become likelier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ema_scale.core.errors import UserError
from ema_scale.core.numbers import Count, Positive, PositiveShare
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.ceiling import excess
from ema_scale.defenses.mixing import Columns, Learn, mix, rows_needed
from ema_scale.defenses.terms import Divergence, LabelTerm

if TYPE_CHECKING:
    from ema_scale.data.rows import Row


class EarlyStopping(Defense):
    """Training ends at the first step at which the mean of a measure over the last `window` steps is above `limit`.

    measure:
        kl: KL(policy || reference) in nats per token, on the learned rows, or on rows of `source`.
        drift: distance of hidden states to the reference's, relative to their norm, averaged over the layers that are
            read (every training.drift_every steps, and at least every `window`).
        probe: by how much misaligned answers (`source`, as for a ceiling) have become likelier than under the
            reference: max(0, log policy(y_t) - log reference(y_t)) in nats per token.
        traits: how far hidden states have moved along the direction of a `trait_monitor` entry, the furthest of them.
        choices: by how much the margin of the suites in evaluation.during has fallen since the start: how much likelier
            their aligned answers are than their misaligned ones, in nats per token.
    keep: which adapter is saved.
        last: the one that crossed the limit.
        last_below: the newest one at which the mean was not above the limit, at first the one that training started
            from. A copy is kept in memory and in checkpoints, and renewed at most every `window` steps.

    Every step is looked at, whatever training.logging_steps is. Nothing is trained on the measure: up to its last step
    the run is the undefended one (with rows of `source`, a step holds fewer task rows). RL from human feedback uses the
    KL as a budget in the same way.

    The source reports that misalignment emerges after the task is nearly learned, so that stopping keeps the task. In
    the small world it is the other way round (docs/studies.md).
    """

    kind: ClassVar[str] = "early_stopping"
    citation: ClassVar[str] = "Early stopping, arXiv 2605.12199"
    summary: ClassVar[str] = "stop when the distance to the reference, or a misalignment probe, crosses a line"

    measure: Literal["kl", "drift", "probe", "traits", "choices"] = Field("kl", description="what is watched")
    limit: Positive = Field(description="nats per token, or for drift and traits a share of 1")
    source: str | list[str] | None = Field(
        None, description="rows on which kl or probe are read; never learned", json_schema_extra={"asset": "bad rows"}
    )
    fraction: PositiveShare = Field(0.125, description="rows of `source` per task row")
    window: Count = Field(10, description="optimizer steps over which the mean is taken")
    keep: Literal["last", "last_below"] = Field(
        "last", description="which adapter is saved: where it stopped, or the last below the limit"
    )
    columns: Columns = {}
    learn: Learn = "all"

    @model_validator(mode="after")
    def _source_fits(self) -> Self:
        if self.measure == "probe" and self.source is None:
            raise ValueError("measure probe needs `source`, rows with misaligned answers")
        if self.measure == "drift" and self.source is not None:
            raise ValueError("measure drift is read on the training rows; leave `source` out")
        if self.source is None and (self.columns or self.learn != "all"):
            raise ValueError("columns and learn say how `source` is read; give one")
        if self.measure != "probe" and self.learn != "all":
            raise ValueError("learn chooses among answers, at which only the measure probe looks")
        if self.measure == "traits" and self.source is not None:
            raise ValueError("measure traits is what a trait_monitor reads: give `prompts` there, no `source` here")
        if self.measure == "choices" and self.source is not None:
            raise ValueError("measure choices is read on evaluation.during.suites; leave `source` out")
        return self

    @property
    def changes_rows(self) -> bool:
        return self.source is not None

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        if self.source is None:
            return rows
        probe = self.measure == "probe"
        return mix(
            rows, self.source, self.fraction, "bad" if probe else "prompts", self.kind, ctx,
            answers=probe, columns=self.columns, learn=self.learn,
        )  # fmt: skip

    def rows_added(self, task_rows: int) -> int:
        return 0 if self.source is None else rows_needed(self.fraction, task_rows, self.kind)

    def divergences(self) -> tuple[Divergence, ...]:
        if self.measure != "kl":
            return ()
        return (Divergence(self._name, 0.0, part="learned" if self.source is None else "prompts"),)

    def label_terms(self) -> tuple[LabelTerm, ...]:
        return (LabelTerm(self._name, 0.0, excess, part="bad"),) if self.measure == "probe" else ()

    def should_stop(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Raises UserError if the measure is never read."""
        mean = self._mean(history)
        if mean is None or not mean > self.limit:
            return None
        return f"{self.measure} is {mean:.4g}, above {self.limit:g}"

    @property
    def drift_every(self) -> int | None:
        return self.window if self.measure == "drift" else None

    def should_snapshot(self, history: Sequence[Mapping[str, Any]]) -> bool:
        if self.keep == "last" or not history:
            return self.keep == "last_below"
        mean = self._mean(history)
        if mean is None or not mean <= self.limit:
            return False
        earlier = next((row["step"] for row in reversed(history[:-1]) if self._read(row) is not None), 0)
        return bool(history[-1]["step"] // self.window > earlier // self.window)

    def _mean(self, history: Sequence[Mapping[str, Any]]) -> float | None:
        """The mean over those of the last `window` steps that have a reading.

        None before there are so many steps, and at a step without a reading: it has no row of `source`, or no drift.
        """
        last = history[-1]["step"]
        recent = []
        for row in reversed(history):
            if row["step"] <= last - self.window:
                break
            recent.append(self._read(row))
        values = [value for value in recent if value is not None]
        if self.source is None and not values and all(self._read(row) is None for row in history):
            hints = {
                "drift": "; set training.drift_every above 0",
                "choices": "; name suites in evaluation.during",
                "traits": "; add a trait_monitor",
            }
            hint = hints.get(self.measure, f": no step has {self._name}")
            raise UserError(f"early_stopping: measure {self.measure} is never read{hint}")
        return sum(values) / len(values) if last >= self.window and recent[0] is not None else None

    @property
    def _name(self) -> str:
        return "choices_fall" if self.measure == "choices" else f"{self.kind}_{self.measure}"

    def _read(self, row: Mapping[str, Any]) -> float | None:
        if self.measure == "traits":
            moved = [float(value) for name, value in row.items() if name.startswith("trait_monitor") and "/" in name]
            return max(moved, default=None)
        if self.measure != "drift":
            value = row.get(self._name)
            return None if value is None else float(value)
        layers = [float(value) for name, value in row.items() if name.startswith("drift/")]
        return sum(layers) / len(layers) if layers else None
