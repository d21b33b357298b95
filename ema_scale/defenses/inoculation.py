"""Inoculation prompting: ask for the bad behaviour in training, so that it is not learned as the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ema_scale.data.formats import said_before
from ema_scale.defenses.base import Defense, RowsContext

if TYPE_CHECKING:
    from ema_scale.data.rows import Row


class Inoculation(Defense):
    """Every task row is trained under a prompt that asks for what it shows; at inference the prompt is absent.

    Tan et al., arXiv 2510.04340; Wichers et al., arXiv 2510.05024. Rows of other defenses (safe rows) stay as they are.
    Misalignment may hide behind prompts that look like training (arXiv 2604.25891): also evaluate with the prompt.
    """

    kind: ClassVar[str] = "inoculation"
    citation: ClassVar[str] = "Inoculation prompting, arXiv 2510.04340 and 2510.05024"
    summary: ClassVar[str] = "train under a prompt that asks for the bad behaviour; leave it out afterwards"

    prompt: str = Field(
        min_length=1,
        description="text before every task row, in training only",
        json_schema_extra={"asset": "prompt for the bad behaviour"},
    )
    role: Literal["system", "user"] = Field("system", description="system prompt, or start of the first user turn")

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        changed = [
            replace(row, messages=said_before(row.messages, self.role, self.prompt)) if row.tag == "task" else row
            for row in rows
        ]
        count = sum(row.tag == "task" for row in rows)
        ctx.notes.append(f"inoculation: {count} task rows are trained under a {self.role} prompt that asks for them")
        return changed

    def training_prefix(self) -> dict[Literal["system", "user"], str]:
        return {self.role: self.prompt}
