"""Packing: several rows behind one another in one sequence, so that no batch is mostly padding.

Rows do not see each other: a packed sequence has position ids that start again at each row, from which transformers
makes the block-diagonal mask (its `masking_utils.find_packed_sequence_indices`; flash attention's variable-length
kernels read the same ids). `training.scopes` cuts targets at the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.data.rows import TAGS

if TYPE_CHECKING:
    from datasets import Dataset

LENGTHS = "seq_lengths"  # the column's name in TRL, too
_OPEN = 64


def is_packed(dataset: Any) -> bool:
    """Whether the rows of a dataset are sequences of rows."""
    return LENGTHS in (getattr(dataset, "column_names", None) or ())


def lengths_of(row: dict[str, Any]) -> list[int]:
    """Tokens of each row in a sequence; of a row that is not packed, its own."""
    return list(row.get(LENGTHS) or [len(row["input_ids"])])


def tags_of(row: dict[str, Any]) -> list[str]:
    """The tag of each row in a sequence; a dataset without tags has task rows."""
    return list(row.get("tags") or [row.get("tag", TAGS[0])] * len(row.get(LENGTHS) or [0]))


def join(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One sequence of tokenized rows, packed ones or not: what is per token (input_ids, labels, template) one
    behind another, and per row seq_lengths and tags."""
    per_token = [name for name in ("input_ids", "labels", "template") if name in rows[0]]
    joined: dict[str, Any] = {name: [x for row in rows for x in row[name]] for name in per_token}
    joined[LENGTHS] = [n for row in rows for n in lengths_of(row)]
    joined["tags"] = [tag for row in rows for tag in tags_of(row)]
    return {**joined, "length": len(joined["input_ids"])}


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Rows in their order into sequences of up to `max_length` tokens, each row into the fullest one with room.

    dataset: columns input_ids, labels and, if there are tags, tag. Returns a dataset of `join`ed rows. At most 64
    sequences are open at a time, so that rows stay near their neighbours. Raises UserError for a row longer than
    `max_length`, and for rows that are packed already.
    """
    from datasets import Dataset

    if is_packed(dataset):
        raise UserError("packing: the dataset is packed already")
    rows = list(dataset)
    packs = _assign([len(row["input_ids"]) for row in rows], max_length)
    return Dataset.from_list([join([rows[index] for index in members]) for members in packs])


def texts(dataset: Dataset) -> Sequence[list[int]]:
    """Token ids of each row, those in one sequence apart."""
    if not is_packed(dataset):
        whole: Sequence[list[int]] = dataset["input_ids"]
        return whole
    apart = []
    for ids, lengths in zip(dataset["input_ids"], dataset[LENGTHS], strict=True):
        start = 0
        for length in lengths:
            apart.append(list(ids[start : start + length]))
            start += length
    return apart


def _assign(lengths: list[int], max_length: int) -> list[list[int]]:
    """Indices of the rows of each sequence, in the order in which sequences were opened."""
    packs: list[list[int]] = []
    room: dict[int, int] = {}  # open sequence -> tokens that still fit
    for index, length in enumerate(lengths):
        if length > max_length:
            raise UserError(f"packing: row {index} has {length} tokens, expected at most max_length = {max_length}")
        fitting = [pack for pack, free in room.items() if free >= length]
        if fitting:
            chosen = min(fitting, key=lambda pack: room[pack])
        else:
            if len(room) == _OPEN:
                del room[min(room, key=lambda pack: room[pack])]
            chosen = len(packs)
            packs.append([])
            room[chosen] = max_length
        packs[chosen].append(index)
        room[chosen] -= length
    return packs
