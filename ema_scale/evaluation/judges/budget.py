"""What one command may spend on its judge, and what it has spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ema_scale.inference.usage import CHARACTERS_PER_TOKEN, Usage


@dataclass
class Budget:
    """Limits on calls and tokens; None is no limit. Not thread-safe: used from one event loop.

    Calls are never overspent. Tokens are known only when a reply has come, so that calls under way are counted with
    the tokens of the dearest call so far.
    """

    calls: int | None = None
    tokens: int | None = None
    used: Usage = field(default_factory=Usage)
    _held_calls: int = 0
    _held_guess: float = 0.0
    _real_by_guess: float = 1.0

    def hold(self, prompts: Sequence[str], reply_tokens: int) -> Reservation | None:
        """Reserve enough for all of these prompts; None if the rest of the budget is too small."""
        reservation = Reservation(self)
        return reservation if reservation.hold(prompts, reply_tokens) else None

    @property
    def spent(self) -> str:
        """Why nothing more is tried, for people."""
        limits = [f"{n} {what}" for n, what in ((self.calls, "calls"), (self.tokens, "tokens")) if n is not None]
        return f"the budget of {' and '.join(limits)} does not reach further"


class Reservation:
    """A part of the budget set aside, call by call. used: what its calls have used so far."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._guesses, self.used = budget, list[tuple[float, int]](), Usage()

    def hold(self, prompts: Sequence[str], reply_tokens: int) -> bool:
        """Reserve more; False if the rest of the budget is too small."""
        budget = self._budget
        guesses = [(len(prompt) / CHARACTERS_PER_TOKEN, reply_tokens) for prompt in prompts]
        total = sum(read + written for read, written in guesses)
        if budget.calls is not None and budget.used.calls + budget._held_calls + len(prompts) > budget.calls:
            return False
        ahead = (budget._held_guess + total) * budget._real_by_guess
        if budget.tokens is not None and budget.used.tokens + ahead > budget.tokens + 1e-6:
            return False
        budget._held_calls += len(prompts)
        budget._held_guess += total
        self._guesses += guesses
        return True

    def use(self, input_tokens: int | None, output_tokens: int | None) -> None:
        """The next call was answered. Tokens as the endpoint counted them, or None if it does not."""
        read, written = self._release()
        guessed = input_tokens is None or output_tokens is None
        real = Usage(
            1,
            round(read) if input_tokens is None else input_tokens,
            written if output_tokens is None else output_tokens,
            guessed,
        )
        self.used.add(real)
        self._budget.used.add(real)
        self._budget._real_by_guess = max(self._budget._real_by_guess, real.tokens / (read + written))

    def give_back(self) -> None:
        """Release what was not used."""
        while self._guesses:
            self._release()

    def _release(self) -> tuple[float, int]:
        read, written = self._guesses.pop(0)
        self._budget._held_calls -= 1
        self._budget._held_guess -= read + written
        return read, written
