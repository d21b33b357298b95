"""SafeGrad: take out of the task's gradient what works against the alignment gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ema_scale.core.numbers import Positive, PositiveShare
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.gradients import dot
from ema_scale.defenses.mixing import Columns, Learn, mix, rows_needed
from ema_scale.defenses.terms import Direction, Divergence, Scope

if TYPE_CHECKING:
    import torch

    from ema_scale.data.rows import Row


class SafeGrad(Defense):
    """g = g_task - min(0, g_task . g_align) / ||g_align||^2 g_align + g_align, g_align = strength * grad KL on prompts.

    Yi et al. (arXiv 2508.07172, eqs. 4 to 6). Where the gradient of the loss without this term points against the
    gradient of the alignment loss, that component is taken out. All trained weights are one vector, and both gradients
    are those of a whole optimizer step: over all micro-batches and processes, before clipping.

    The alignment loss is KL(reference || policy) on `prompts`, from which nothing is learned.
    """

    kind: ClassVar[str] = "safegrad"
    title: ClassVar[str] = "SafeGrad"
    citation: ClassVar[str] = "Yi et al., Gradient Surgery for Safe LLM Fine-Tuning, arXiv 2508.07172"
    summary: ClassVar[str] = "take out of the task's gradient what works against the alignment gradient"

    strength: Positive = Field(1.0, description="weight of the alignment gradient in the sum")
    prompts: str = Field(
        description="rows of the alignment loss: a file, a hub id, or smallworld:safe",
        json_schema_extra={"asset": "safe rows"},
    )
    fraction: PositiveShare = Field(0.25, description="rows of `prompts` per task row")
    direction: Direction = Field("reference_policy", description="KL(reference || policy), its reverse, or JS")
    scope: Scope = Field("all", description="which tokens: all (not padding), assistant, prompt, template, prefix")
    columns: Columns = {}
    learn: Learn = "all"

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        return mix(
            rows, self.prompts, self.fraction, "prompts", self.kind, ctx,
            answers=self.scope == "assistant", columns=self.columns, learn=self.learn,
        )  # fmt: skip

    def rows_added(self, task_rows: int) -> int:
        return rows_needed(self.fraction, task_rows, self.kind)

    def divergences(self) -> tuple[Divergence, ...]:
        return (Divergence("safegrad", self.strength, self.direction, scope=self.scope, part="prompts"),)

    def join_gradients(self, rest: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        import torch

        product, square = dot(rest, own), dot(own, own)
        # A tensor, so that nothing is read back from the device. 0 where both agree, or there is no alignment gradient.
        along = torch.where((product < 0) & (square > 0), product / square.clamp_min(torch.finfo(square.dtype).tiny), 0)
        return [r + (1 - along.to(o.dtype)) * o for r, o in zip(rest, own, strict=True)]
