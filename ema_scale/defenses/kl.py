"""KL: keep the output distribution close to the frozen base model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ema_scale.core.numbers import NotNegative, Positive, PositiveShare
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.mixing import Columns, Learn, Triggers, mix, rows_needed
from ema_scale.defenses.terms import Direction, Divergence, Scope

if TYPE_CHECKING:
    from ema_scale.data.rows import Row


class KL(Defense):
    """loss = CE + strength * mean_t KL(policy_t || reference_t), full vocabulary (arXiv 2508.06249).

    The paper: strength 0.1, every non-padding token, prompt included. The mean is over all such tokens of the
    optimizer step, so the strength means the same under any batch split, accumulation or number of processes. The
    released trainer does not divide its KL by the accumulation: its 0.1 at 4 x 4 is about 0.4 here.

    prompts: rows of their own, one after every 1/fraction task rows. Nothing is learned from them, and the divergence
        looks at nothing else (arXiv 2602.07852: a separate general set), so the term does not hold back the task
        itself. That paper's term is KL(reference || policy), averaged over tokens and vocabulary: `direction:
        reference_policy`, with its weight divided by the size of the vocabulary. Unless the scope is `assistant`,
        they need no answers: a prompt alone is read up to where its answer would begin.
    part: `safe` looks only at rows that an interleaving brought in.

    Rows of `prompts` or of a part are spread evenly over the steps. The term is skipped in steps without such rows: use
    a fraction that gives at least one per step. With packing, some steps may have none.
    """

    kind: ClassVar[str] = "kl"
    title: ClassVar[str] = "KL"
    citation: ClassVar[str] = "In-Training Defenses against Emergent Misalignment, arXiv 2508.06249"
    summary: ClassVar[str] = "keep the output distribution close to the frozen base model's"

    strength: NotNegative = Field(0.1, description="weight of the divergence, nats; 0 only measures")
    direction: Direction = Field("policy_reference", description="KL(policy || reference), its reverse, or JS")
    temperature: Positive = Field(1.0, description="divides both logits")
    scope: Scope = Field("all", description="which tokens: all (not padding), assistant, prompt, template, prefix")
    part: Literal["learned", "task", "safe"] = Field("learned", description="which rows: all learned ones, or a part")
    prompts: str | None = Field(
        None,
        description="rows to look at instead: a file, a hub id, or smallworld:safe",
        json_schema_extra={"asset": "safe rows"},
    )
    fraction: PositiveShare = Field(0.25, description="rows of `prompts` per task row")
    columns: Columns = {}
    learn: Learn = "all"
    triggers: Triggers = 0

    @model_validator(mode="after")
    def _one_part(self) -> Self:
        if self.prompts is not None and self.part != "learned":
            raise ValueError("give prompts, which are a part of their own, or part, not both")
        if self.prompts is None and (self.columns or self.learn != "all" or self.triggers):
            raise ValueError("columns, learn and triggers say how prompts are read; give prompts")
        if self.learn != "all" and self.scope != "assistant":
            raise ValueError("learn chooses among answers; give scope: assistant")
        return self

    @property
    def changes_rows(self) -> bool:
        return self.prompts is not None

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        if self.prompts is None:
            return rows
        answers = self.scope == "assistant"
        return mix(
            rows, self.prompts, self.fraction, "prompts", self.kind, ctx,
            answers=answers, columns=self.columns, learn=self.learn, triggers=self.triggers,
        )  # fmt: skip

    def rows_added(self, task_rows: int) -> int:
        return 0 if self.prompts is None else rows_needed(self.fraction, task_rows, self.kind)

    def divergences(self) -> tuple[Divergence, ...]:
        part = self.part if self.prompts is None else "prompts"
        return (Divergence("kl", self.strength, self.direction, self.temperature, self.scope, part),)
