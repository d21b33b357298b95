"""Relearning: is misalignment gone from a defended adapter, or does it come back after a few undefended rows?

A solution that a defense holds narrow may fall back when the defense is taken away (arXiv 2602.07852).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ema_scale.config.layers import merge
from ema_scale.core.numbers import Count, Positive
from ema_scale.recipe import Recipe, build_recipe


class Relearning(BaseModel):
    """Undefended training that goes on from each defended adapter, for so many rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: list[Count] = Field(
        min_length=1,
        description="How many of the task's first rows; one run for each number.",
        examples=[[8, 16, 32, 64]],
    )
    epochs: Positive = Field(10.0, description="How often each of these rows is seen.")
    source: str | None = Field(
        None, description="Rows in place of the task's own, such as bad rows of another domain.", examples=["bad.jsonl"]
    )

    @field_validator("rows")
    @classmethod
    def _numbers(cls, rows: list[int]) -> list[int]:
        if any(count < 1 for count in rows) or len(set(rows)) < len(rows):
            raise ValueError("expected different numbers of rows, each at least 1")
        return rows

    def names(self, run: str) -> list[str]:
        """The names of the runs that go on from a run."""
        return [f"{run}-relearn{count}" for count in self.rows]

    def recipes(self, trained: Iterable[Recipe]) -> Iterator[Recipe]:
        """A recipe for each defended run that is asked general questions, and each number of rows.

        The learning rate and its schedule are the run's own, without a warm-up. Conditions are not asked, and
        checkpoints not kept.
        """
        for recipe in trained:
            suites = recipe.evaluation.suites
            if not recipe.defenses or not suites.general or suites.benign:
                continue
            for name, count in zip(self.names(recipe.name), self.rows, strict=True):
                yield build_recipe(merge(recipe.to_dict(), self._changes(recipe, name, count)))

    def _changes(self, recipe: Recipe, name: str, count: int) -> dict[str, Any]:
        return {
            "name": name,
            "defenses": [],
            "reference": "auto",
            "adapter": {"start": str((Path(recipe.run_path) / "adapter").absolute())},
            "data": {"limit": count, **({"train": self.source} if self.source else {})},
            "training": {"max_steps": -1, "num_train_epochs": self.epochs, "warmup_steps": 0},
            "evaluation": {"conditions": [], "inoculation": "never", "row_triggers": "never", "checkpoints": False},
        }
