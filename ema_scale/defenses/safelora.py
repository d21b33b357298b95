"""SafeLoRA: after training, project the adapter onto the alignment subspace."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from ema_scale.defenses.base import Defense, FinishContext


class SafeLoRA(Defense):
    """Replaces B by C B, C = V V^T / ||V||_F with V = W_aligned - W_base, where the update strays from the subspace.

    Hsu et al., arXiv 2405.16833; `safelora_projection` has the maths, which never forms C. The paper on in-training
    defenses uses threshold 0.3. The aligned model is the one that is fine-tuned.
    """

    kind: ClassVar[str] = "safelora"
    citation: ClassVar[str] = "Hsu et al., Safe LoRA, arXiv 2405.16833"
    summary: ClassVar[str] = "after training, project the adapter onto the alignment subspace"

    base: str = Field(description="the unaligned model that the fine-tuned one was made from: a folder")
    threshold: float | None = Field(None, ge=-1, le=1, description="project where the cosine is at or below it; 0.3")
    layers_projected: int | None = Field(None, ge=1, description="or: project this many matrices, lowest cosine first")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("threshold") is not None and values.get("layers_projected") is not None:
                raise ValueError("give threshold or layers_projected, not both")
            if values.get("threshold") is None and values.get("layers_projected") is None:
                values = {**values, "threshold": 0.3}
        return values

    def finish(self, adapter_dir: Path, ctx: FinishContext) -> None:
        from ema_scale.defenses.safelora_projection import project_adapter
        from ema_scale.locate import locate

        results = project_adapter(
            adapter_dir,
            adapter_dir,
            Path(locate(self.base)),
            Path(ctx.model_path),
            threshold=self.threshold,
            layers=self.layers_projected,
        )
        replaced = sum(result.replaced for result in results)
        lowest = min((result.cosine for result in results), default=1.0)
        ctx.notify(f"safelora: {replaced} of {len(results)} matrices projected (lowest cosine {lowest:.3f})")
