"""Inoculation adapter: a frozen LoRA of the bad trait is on while training, and gone afterwards."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ema_scale.core.numbers import NotNegative
from ema_scale.defenses.base import Defense
from ema_scale.models.side_adapters import SideAdapter
from ema_scale.models.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, folder_of


class InoculationAdapter(Defense):
    """The policy is trained with a second adapter on: h = W x + task(x) + scale * inoculation(x), task alone is saved.

    Riche et al. (arXiv 2606.30252). What the frozen adapter already does, the task's adapter need not learn. It is on
    for the task's rows, and off for rows that other defenses bring in: these hold the policy as it will be.

    The first half of Buffer-and-Reinforce (arXiv 2605.24550) is the same. KL and LDIFS on the task's rows compare the
    policy with both adapters on with the base model.
    """

    kind: ClassVar[str] = "inoculation_adapter"
    citation: ClassVar[str] = "Riche et al., Inoculation Adapters, arXiv 2606.30252"
    summary: ClassVar[str] = "train beside a frozen adapter of the bad trait; leave it out afterwards"

    adapter: str = Field(
        min_length=1,
        description="a LoRA adapter that was trained on the bad trait: a PEFT folder or hub id",
        json_schema_extra={"asset": "an adapter of the bad trait"},
    )
    scale: NotNegative = Field(1.0, description="factor on what the adapter adds")

    def files(self) -> tuple[str, ...]:
        folder = folder_of(self.adapter)
        return tuple(str(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))

    def side_adapters(self) -> tuple[SideAdapter, ...]:
        return (SideAdapter(self.adapter, scale=self.scale),)
