"""Packing: several rows behind one another in one sequence, so that no batch is mostly padding.

Rows do not see each other: a packed sequence has position ids that start again at each row, from which transformers
makes the block-diagonal mask (its `masking_utils.find_packed_sequence_indices`; flash attention's variable-length
kernels read the same ids). `training.scopes` cuts targets at the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ema_scale.core.errors import UserError
from ema_scale.data.rows import TAGS
from ema_scale.data.token_tables import dataset_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

LENGTHS = "seq_lengths"  # the column's name in TRL, too
PER_TOKEN = ("input_ids", "labels", "template")
_OPEN = 64
_AT_ONCE = 4096  # sequences, or rows


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
    per_token = [name for name in PER_TOKEN if name in rows[0]]
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
    if is_packed(dataset):
        raise UserError("packing: the dataset is packed already")
    # Arrow's arrays from end to end: as lists, a token would take eight bytes and more in every process.
    arrow = dataset.with_format("arrow")
    packs = _assign(_lengths(arrow), max_length)
    tables = [_joined(arrow, packs[start : start + _AT_ONCE]) for start in range(0, len(packs) or 1, _AT_ONCE)]
    return dataset_of(tables, uuid4().hex)


def _lengths(arrow: Dataset) -> list[int]:
    import pyarrow.compute as pc

    ids = arrow.select_columns("input_ids")
    slices = (ids[start : start + _AT_ONCE]["input_ids"] for start in range(0, len(ids), _AT_ONCE))
    return [length for part in slices for length in pc.list_value_length(part).to_pylist()]


def _joined(arrow: Dataset, packs: Sequence[Sequence[int]]) -> pa.Table:
    """`join`, for many sequences at once: their rows lie behind one another, and only the limits differ."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = arrow[[index for members in packs for index in members]]
    ends = list(accumulate((len(members) for members in packs), initial=0))  # in rows
    tokens = list(accumulate(pc.list_value_length(rows["input_ids"]).to_pylist(), initial=0))
    limits = pa.array([tokens[end] for end in ends], pa.int64())
    columns = {
        name: pa.LargeListArray.from_arrays(limits, rows[name].combine_chunks().flatten())
        for name in PER_TOKEN
        if name in rows.column_names
    }
    lengths = pa.array([end - start for start, end in pairwise(tokens)], pa.int64())
    tags = rows["tag"].combine_chunks() if "tag" in rows.column_names else pa.array([TAGS[0]] * len(lengths))
    per_row = pa.array(ends, pa.int64())
    columns[LENGTHS] = pa.LargeListArray.from_arrays(per_row, lengths)
    columns["tags"] = pa.LargeListArray.from_arrays(per_row, tags)
    columns["length"] = pc.subtract(limits[1:], limits[:-1])
    return pa.table(columns)


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
