"""Trait monitor: read how far hidden states have moved along trait directions, and say when one goes too far."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from ema_scale.core.numbers import Count, Positive, PositiveShare
from ema_scale.defenses.base import Defense, PenaltyInputs, RowsContext
from ema_scale.defenses.direction_files import Files, Layers, check_files, layers_of, listed, trait_names
from ema_scale.defenses.mixing import Columns, mix, rows_needed
from ema_scale.defenses.terms import Part, Scope

if TYPE_CHECKING:
    import torch

    from ema_scale.data.rows import Row
    from ema_scale.models.directions import Directions

log = logging.getLogger(__name__)


class TraitMonitor(Defense):
    """Reads mean_t (policy_lt - reference_lt).u / |reference_lt| per trait, each optimizer step. Trains on nothing.

    Nghiem et al., arXiv 2606.07631. u: the unit direction of a trait, at the layer that its file recommends. A positive
    reading is a move towards the trait, as a share of the states' length.

    The readings are logged as `trait_monitor/NAME`, by the names of the files. With `limit`, the log warns when the
    mean of a reading over `window` steps goes above it. `early_stopping` with `measure: traits` ends training there.

    prompts: rows on which it is read, in place of the learned ones. Nothing is learned from them. Take prompts that the
        task is not about: on the task's own rows a move may be what is to be learned.
    """

    kind: ClassVar[str] = "trait_monitor"
    citation: ClassVar[str] = "Nghiem et al., Trait-space Monitoring, arXiv 2606.07631"
    summary: ClassVar[str] = "read how far hidden states move along trait directions, and warn above a limit"
    layer_by_layer: ClassVar[bool] = True

    vector: Files = Field(
        min_length=1,
        description="trait directions: files made by `ema vector`",
        json_schema_extra={"asset": "directions"},
    )
    limit: Positive | None = Field(None, description="warn above it; a share of 1")
    window: Count = Field(10, description="optimizer steps over which the mean is taken")
    at_layers: Layers = Field("auto", description="after which decoder layers (1: the first); auto: as each file says")
    scope: Scope = Field("all", description="which tokens: all, assistant, prompt, template, prefix")
    prompts: str | None = Field(
        None, description="rows to read it on: a file, a hub id", json_schema_extra={"asset": "safe rows"}
    )
    fraction: PositiveShare = Field(0.125, description="rows of `prompts` per task row")
    columns: Columns = {}

    @model_validator(mode="after")
    def _columns_need_prompts(self) -> Self:
        if self.prompts is None and self.columns:
            raise ValueError("columns say how prompts are read; give prompts")
        return self

    @property
    def changes_rows(self) -> bool:
        return self.prompts is not None

    @property
    def needs_reference(self) -> bool:
        return True

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        if self.prompts is None:
            return rows
        answers = self.scope == "assistant"
        return mix(rows, self.prompts, self.fraction, "prompts", self.kind, ctx, answers=answers, columns=self.columns)

    def rows_added(self, task_rows: int) -> int:
        return 0 if self.prompts is None else rows_needed(self.fraction, task_rows, self.kind)

    def files(self) -> tuple[str, ...]:
        return tuple(listed(self.vector))

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Raises UserError for directions of a model of another shape, and layers that do not exist."""
        check_files(self.files(), self.at_layers, model)
        return contextlib.nullcontext()

    def penalty_layers(self, num_layers: int) -> tuple[int, ...]:
        return layers_of(self.files(), self.at_layers, num_layers)

    def penalty(self, inputs: PenaltyInputs) -> torch.Tensor | None:
        """None: it only reads."""
        part: Part = "learned" if self.prompts is None else "prompts"
        for layer in sorted(inputs.policy):
            policy, reference = inputs.states(layer, self.scope, part)
            moved = (policy.detach() - reference) / reference.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            for name, directions in self._directions.items():
                chosen = directions.choose(self.at_layers)
                if layer in chosen:
                    name = name if len(chosen) == 1 else f"{name}/layer_{layer}"
                    inputs.read(name, moved @ directions.unit(layer).to(moved), self.scope, part)
        return None

    def should_stop(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Never; but it warns at the step at which a mean crosses the limit."""
        if self.limit is None or int(os.environ.get("RANK", "0")) != 0:
            return None
        for name in (name for name in history[-1] if name.startswith(f"{self.kind}/")):
            now, before = (_mean(rows, name, self.window) for rows in (history, history[:-1]))
            if now is not None and now > self.limit and (before is None or before <= self.limit):
                step = history[-1]["step"]
                log.warning("step %d: %s is %.4g, above %g: the model moves towards it", step, name, now, self.limit)
        return None

    @cached_property
    def _directions(self) -> dict[str, Directions]:
        from ema_scale.models.directions import Directions

        return {name: Directions.load(file) for name, file in zip(trait_names(self.vector), self.files(), strict=True)}


def _mean(history: Sequence[Mapping[str, float]], name: str, window: int) -> float | None:
    """Over the readings of the last `window` steps; None before there are so many steps."""
    if len(history) < window:
        return None
    read = [row[name] for row in history[-window:] if name in row]
    return sum(read) / len(read) if read else None
