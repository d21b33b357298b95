"""Batches: rows of different lengths put side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ema_scale.core.errors import UserError
from ema_scale.data.packing import LENGTHS, join, lengths_of, tags_of
from ema_scale.data.rows import TAGS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ChatCollator:
    """Pads a list of tokenised rows to the longest of them.

    Returns input_ids, attention_mask (1 on real tokens) and labels (-100 on padding), each int64 [B, T], and tags [B],
    each row's place in `tags` (0 where a dataset has no tags); template [B, T] if rows have that column. Padding is
    known by length: the pad token's id may equal any other's. pad_to_multiple_of rounds T up (tensor cores like 8).

    Packed rows (see `packing`) also get position_ids [B, T], which start again at each row, and tags for each token,
    [B, T]. one_sequence packs the whole batch into one, B = 1: flash attention keeps rows apart in no other.
    """

    tokenizer: Any
    pad_to_multiple_of: int | None = None
    padding_side: Literal["right", "left"] = "right"
    one_sequence: bool = False
    tags: tuple[str, ...] = TAGS

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        rows = [join(rows)] if self.one_sequence else rows
        width = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        fills = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": -100}
        if "template" in rows[0]:
            fills["template"] = 0
        packed = any(LENGTHS in row for row in rows)
        if packed:
            fills |= {"position_ids": 0, "tags": 0}
        batch = {key: torch.full((len(rows), width), fill, dtype=torch.long) for key, fill in fills.items()}
        for index, row in enumerate(rows):
            n = len(row["input_ids"])
            place = slice(0, n) if self.padding_side == "right" else slice(width - n, width)
            batch["input_ids"][index, place] = torch.as_tensor(row["input_ids"])
            batch["labels"][index, place] = torch.as_tensor(row["labels"])
            batch["attention_mask"][index, place] = 1
            if "template" in fills:
                batch["template"][index, place] = torch.as_tensor(row["template"])
            if packed:
                lengths = torch.tensor(lengths_of(row))
                tags = torch.tensor([self.tags.index(tag) for tag in tags_of(row)])
                batch["position_ids"][index, place] = torch.cat([torch.arange(length) for length in lengths])
                batch["tags"][index, place] = tags.repeat_interleave(lengths)
        if not packed:
            batch["tags"] = torch.tensor([self.tags.index(row.get("tag", TAGS[0])) for row in rows])
        return batch


@dataclass(frozen=True)
class OtherCollator:
    """A collator that is not ours. Where nothing asks for the parts of the mix it is not shown the rows' tags, which
    are text, and most collators make a tensor of every column.

    Raises UserError for rows that it cannot take.
    """

    collator: Callable[[Any], Any]
    needs_tags: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        if not self.needs_tags:
            rows = [{name: value for name, value in row.items() if name not in ("tag", "tags")} for row in rows]
        try:
            return self.collator(rows)
        except (ValueError, TypeError, KeyError) as error:
            name = getattr(self.collator, "__name__", type(self.collator).__name__)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data_collator: {name} fails on rows with the columns {', '.join(rows[0])} ({reason}); leave it out, "
                "or extend ema_scale.data.collate.ChatCollator"
            ) from error
