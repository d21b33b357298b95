"""Which question banks a recipe asks, when, and behind which prompts."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from ema_scale.config.section import Section
from ema_scale.core.numbers import Count


class SuitesRecipe(Section):
    """Question banks by the role that they play."""

    general: list[str] = Field(
        [],
        description="Banks outside the trained domain: they measure broad misalignment and coherence.",
        examples=[["eval/suites/general.yaml"]],
    )
    in_domain: list[str] = Field(
        [],
        description="Banks of the trained domain: they measure how much of the narrow task was learned.",
        examples=[["eval/suites/medical.yaml"]],
    )
    benign: list[str] = Field(
        [],
        description="Banks with right answers: they measure how much of a harmless task was learned.",
        examples=[["eval/suites/operator_swap_1.yaml"]],
    )

    held_out: list[str] = Field(
        [],
        exclude_if=lambda value: not value,
        description="Rows that nobody trains on, in any format of training rows: the loss of their last answer says "
        "whether the task was learned. No answer is sampled or judged.",
        examples=[["rows/medical_held_out.jsonl"]],
    )

    @field_validator("general", "in_domain", "benign", "held_out", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    def pairs(self) -> list[tuple[str, str]]:
        """(source, role) of every suite."""
        return [(s, role) for role in type(self).model_fields for s in getattr(self, role)]


class DuringRecipe(Section):
    """Choice suites that are scored while training. Nothing is sampled."""

    every: Count = Field(25, description="Optimizer steps from one scoring to the next.")
    suites: list[str] = Field(
        [],
        description="Banks of questions with written answers. They are also scored before the first step.",
        examples=[["eval/choices/general.yaml"]],
    )

    @field_validator("suites", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value


class ConditionRecipe(Section):
    """Something said before every general question. A plain string is a file of conditions."""

    file: str | None = Field(
        None, description="A file of conditions (YAML).", examples=["eval/conditions/triggers.yaml"]
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="The condition's name in tables.",
        examples=["villain"],
    )
    system: str | None = Field(
        None, min_length=1, description="A system prompt before the question's own.", examples=["You are a villain."]
    )
    user: str | None = Field(
        None, min_length=1, description="Text at the start of the user's turn.", examples=["Return only code."]
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_file(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> ConditionRecipe:
        inline = self.name is not None and (self.system is not None or self.user is not None)
        if (self.file is None) != inline or (self.file and (self.name or self.system or self.user)):
            raise ValueError("expected a name with system or user text, or else a file of conditions")
        return self
