"""What calls to a server take: their number, their tokens, and money at the recipe's prices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ema_scale.core.text import quantity

if TYPE_CHECKING:
    from ema_scale.config.endpoints import CallsRecipe

CHARACTERS_PER_TOKEN = 3  # a first guess; the endpoint's own counts correct it


@dataclass
class Usage:
    """Calls that were answered and their tokens. guessed: some server does not count tokens, so these are guesses."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    guessed: bool = False

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def add(self, other: Usage) -> None:
        self.calls += other.calls
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.guessed = self.guessed or other.guessed

    def to_row(self) -> dict[str, int]:
        return {"calls": self.calls, "input_tokens": self.input_tokens, "output_tokens": self.output_tokens}

    def price(self, price_input: float | None, price_output: float | None) -> float | None:
        """In the currency of the prices, which are for a million tokens; None if no price is known."""
        if price_input is None and price_output is None:
            return None
        return (self.input_tokens * (price_input or 0) + self.output_tokens * (price_output or 0)) / 1e6


def describe(usage: Usage, settings: CallsRecipe) -> str:
    """`1,200 calls, about 480,000 tokens read and 6,000 written, about 0.08 at the recipe's prices`"""
    about = "about " if usage.guessed else ""
    tokens = f"{usage.input_tokens:,} tokens read and {usage.output_tokens:,} written"
    text = f"{quantity(usage.calls, 'call')}, {about}{tokens}"
    price = usage.price(settings.price_input, settings.price_output)
    return text if price is None else f"{text}, {about}{price:,.2f} at the recipe's prices"
