"""SafeLoRA: after training, project the adapter onto the alignment subspace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ema_scale.core.numbers import Cosine, Count
from ema_scale.defenses.base import Defense, FinishContext
from ema_scale.defenses.safelora_files import REPORT, aligned_pair
from ema_scale.models.weights import folder_of

if TYPE_CHECKING:
    from ema_scale.defenses.safelora_projection import Projected


class SafeLoRA(Defense):
    """Replaces B by C B where the update strays from the subspace; C = V V^T / ||V||_F, V = W_aligned - W_base.

    Hsu et al., arXiv 2405.16833; `safelora_projection` has the mathematics, which never forms C. arXiv 2508.06249 uses
    threshold 0.3. The aligned model is the one that is fine-tuned, at the revision that was loaded (in Python: the
    `revision` of the PEFT config).
    """

    kind: ClassVar[str] = "safelora"
    title: ClassVar[str] = "SafeLoRA"
    adapter_files: ClassVar[tuple[str, ...]] = (REPORT,)
    citation: ClassVar[str] = "Hsu et al., Safe LoRA, arXiv 2405.16833"
    summary: ClassVar[str] = "after training, project the adapter onto the alignment subspace"

    base: str = Field(
        description="the unaligned model from which the fine-tuned one was made: a folder or hub id",
        json_schema_extra={"asset": "unaligned base model"},
    )
    threshold: Cosine | None = Field(None, description="project where the cosine is at or below it; 0.3")
    layers_projected: Count | None = Field(None, description="or: project this many matrices, lowest cosine first")
    base_revision: str | None = Field(None, description="of a base on the hub: a branch, tag or commit")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("threshold") is not None and values.get("layers_projected") is not None:
                raise ValueError("give threshold or layers_projected, not both")
            if values.get("threshold") is None and values.get("layers_projected") is None:
                values = {**values, "threshold": 0.3}
        return values

    @contextlib.contextmanager
    def attach(self, model: Any) -> Iterator[None]:
        """Raises UserError, before training, for a base that is missing, of another model, or the aligned one."""
        aligned_pair(self.kind, model, self.base, self.base_revision)
        yield

    def after_training(self, adapter_dir: Path, ctx: FinishContext) -> None:
        from ema_scale.defenses.safelora_projection import project_adapter

        results = project_adapter(
            adapter_dir,
            None,
            folder_of(self.base, self.base_revision),
            folder_of(ctx.model_path, ctx.revision),
            threshold=self.threshold,
            layers=self.layers_projected,
        )
        ctx.notify(f"safelora: {summary(results)}")


def summary(results: Sequence[Projected]) -> str:
    """The result in one line."""
    replaced = sum(result.replaced for result in results)
    lowest, highest = (choose(result.cosine for result in results) for choose in (min, max))
    return f"{replaced} of {len(results)} matrices projected (cosines {lowest:.3f} to {highest:.3f})"
