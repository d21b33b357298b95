"""TReFT: hold keys and values of the tokens before the first text of a conversation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr

from ema_scale.core.numbers import NotNegative
from ema_scale.defenses.base import Defense, PenaltyInputs
from ema_scale.defenses.terms import Scope, TokenSet

if TYPE_CHECKING:
    import torch

    from ema_scale.models.prefix import PrefixReader


class TReFT(Defense):
    """loss = CE + strength * mean_l mean_t (|k_lt - k'_lt|^2 / |k'_lt|^2 + |v_lt - v'_lt|^2 / |v'_lt|^2).

    Over the tokens t that the chat template writes before the first text: a system header with its default prompt, and
    the user's header. k, v: outputs of k_proj and v_proj of layer l under the policy; k', v': under the frozen model.
    These tokens see nothing of the row, so k' and v' are computed once, on their own, and no reference pass is run.

    Zhao et al., arXiv 2606.06667: what fine-tuning binds to a prefix that all conversations share is carried onto
    unrelated questions.
    """

    kind: ClassVar[str] = "treft"
    title: ClassVar[str] = "TReFT"
    citation: ClassVar[str] = "Zhao et al., The Piggyback Hypothesis (TReFT), arXiv 2606.06667"
    summary: ClassVar[str] = "hold keys and values of the tokens before a conversation's first text"
    scope: ClassVar[Scope] = "prefix"

    strength: NotNegative = Field(1.0, description="weight of the relative squared distance")

    _reader: PrefixReader | None = PrivateAttr(None)

    @contextlib.contextmanager
    def attach(self, model: Any) -> Iterator[None]:
        """Raises UserError for a model without k_proj and v_proj."""
        from ema_scale.models.prefix import PrefixReader

        self._reader = PrefixReader(model, TokenSet(self.scope))
        try:
            with self._reader.attached():
                yield
        finally:
            self._reader = None

    def penalty(self, inputs: PenaltyInputs) -> torch.Tensor | None:
        """None outside training."""
        import torch

        read_now = self._reader.projections if self._reader is not None else []
        if not read_now:
            return None
        sums = []
        for read in read_now:
            policy, reference = (x.float() if x.dtype.itemsize < 4 else x for x in (read.policy, read.reference))
            apart = (policy - reference).square().sum(-1) / reference.square().sum(-1).clamp_min(1e-24)
            sums.append(apart.sum())
        layers = len(sums) / 2  # one of keys and one of values per layer
        tokens = inputs.step_tokens[TokenSet(self.scope)].clamp_min(1)
        return self.strength * torch.stack(sums).sum() / layers / tokens
