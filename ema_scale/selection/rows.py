"""Rows as tokens that models will read, and an account of every row that will not be read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ema_scale.chat.rows import Dropped, Row, Rows
from ema_scale.chat.tokens import Encoder
from ema_scale.errors import UserError
from ema_scale.evaluation.progress import Progress
from ema_scale.rundir import digest


@dataclass(frozen=True)
class Item:
    """One row as tokens. answered: 1 on the tokens whose likelihood counts (the assistant's, its end of turn included);
    key: stands for both, so that equal rows have equal keys."""

    row: Row
    ids: list[int]
    answered: list[int]
    key: str


@dataclass
class Account:
    """Every row that was left out, by reason: `unreadable` (no conversation, or no mask), `too long`, `empty` (no
    answer token), `duplicate`, and whatever later steps add. read: all rows of the source."""

    read: int = 0
    left_out: dict[str, list[Dropped]] = field(default_factory=dict)

    def leave_out(self, why: str, origin: str, reason: str) -> None:
        self.left_out.setdefault(why, []).append(Dropped(origin, reason))

    @property
    def counts(self) -> dict[str, int]:
        return {why: len(rows) for why, rows in self.left_out.items()}

    def line(self) -> str:
        """What a person should know: "1000 rows: 3 too long, 1 empty left out"."""
        found = ", ".join(f"{n} {why}" for why, n in self.counts.items())
        return f"{self.read} rows" + (f": {found} left out" if found else ", none left out")


def read_items(rows: Rows, encoder: Encoder, max_length: int) -> tuple[list[Item], Account]:
    """The rows that a model can read whole, in their order, and the account of the others.

    A row longer than max_length is left out, not cut: the likelihood of half an answer is that of another answer.
    Raises UserError if none is left.
    """
    account = Account(len(rows) + len(rows.dropped))
    for dropped in rows.dropped:
        account.leave_out("unreadable", dropped.origin, dropped.reason)
    items: dict[str, Item] = {}
    with Progress("tokenizing", len(rows), unit="row") as progress:
        for row in rows:
            progress.add()
            try:
                found = encoder.encode(row.messages)
            except UserError as error:
                account.leave_out("unreadable", row.origin, str(error))
                continue
            # The first token is predicted by nothing.
            answered = [0, *found.assistant_mask[1:]]
            if len(found.input_ids) > max_length:
                account.leave_out("too long", row.origin, f"{len(found.input_ids)} tokens, more than {max_length}")
            elif not any(answered):
                account.leave_out("empty", row.origin, "no answer token")
            elif (key := digest(found.input_ids, answered)) in items:
                account.leave_out("duplicate", row.origin, f"the same as {items[key].row.origin}")
            else:
                items[key] = Item(row, found.input_ids, answered, key)
    if not items:
        raise UserError(f"{rows.source}: nothing left to read; {account.line()}")
    return list(items.values()), account


def batches(items: Iterable[Item], batch_tokens: int) -> list[list[Item]]:
    """Items of similar length together, longest first (memory runs out at once or never): each batch, padded, has at
    most batch_tokens tokens, or is one item."""
    made: list[list[Item]] = []
    for item in sorted(items, key=lambda one: -len(one.ids)):
        if not made or (len(made[-1]) + 1) * len(made[-1][0].ids) > batch_tokens:
            made.append([])
        made[-1].append(item)
    return made
