"""AsFT: keep the adapter's update inside the alignment direction while training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr

from ema_scale.core.errors import UserError
from ema_scale.core.numbers import NotNegative
from ema_scale.defenses.base import Defense, PenaltyInputs
from ema_scale.defenses.safelora_files import aligned_pair

if TYPE_CHECKING:
    import torch

    from ema_scale.models.alignment import AlignedUpdate


class AsFT(Defense):
    """loss = CE + strength * sum_m ||(I - C_m) s B_m A_m||_F^2; C = V V^T / ||V||_F, V = W_aligned - W_base.

    Yang et al., arXiv 2506.08473: SafeLoRA's direction as a penalty in training. m: the adapted matrices; s: the LoRA
    scale. The released code leaves s out. The sum is over matrices and does not depend on the rows; every micro-batch
    adds its share of the step's tokens of it. The aligned model is the one that is fine-tuned.

    Neither C nor B A is formed: with X = B - C B, the term is trace(X^T X A A^T). Per matrix, V or V V^T, whichever is
    smaller, stays beside the model in the dtype of its weights.
    """

    kind: ClassVar[str] = "asft"
    title: ClassVar[str] = "AsFT"
    citation: ClassVar[str] = "Yang et al., AsFT, arXiv 2506.08473"
    summary: ClassVar[str] = "penalise the part of the adapter's update outside the alignment direction"
    whole_weights: ClassVar[bool] = True

    strength: NotNegative = Field(1.0, description="weight of the squared norm of that part")
    base: str = Field(
        description="the unaligned model from which the fine-tuned one was made: a folder or hub id",
        json_schema_extra={"asset": "unaligned base model"},
    )
    base_revision: str | None = Field(None, description="of a base on the hub: a branch, tag or commit")

    _updates: list[AlignedUpdate] | None = PrivateAttr(None)

    @contextlib.contextmanager
    def attach(self, model: Any) -> Iterator[None]:
        """Raises UserError under ZeRO-3 and FSDP, and for a base that is missing or does not fit."""
        from ema_scale.models.alignment import aligned_updates
        from ema_scale.models.sharding import weights_are_sharded

        if weights_are_sharded():
            raise UserError("asft: reads whole adapter weights, which ZeRO-3 and FSDP shard; use ZeRO-2 or DDP")
        base, aligned = aligned_pair(self.kind, model, self.base, self.base_revision)
        self._updates = aligned_updates(model, lambda name: aligned.weight(name).float() - base.weight(name).float())
        try:
            yield
        finally:
            self._updates = None

    def penalty(self, inputs: PenaltyInputs) -> torch.Tensor | None:
        """None outside training."""
        import torch

        if self._updates is None:
            return None
        share = inputs.mean(torch.ones_like(inputs.labels, dtype=torch.float32))
        return self.strength * torch.stack([update.outside() for update in self._updates]).sum() * share
