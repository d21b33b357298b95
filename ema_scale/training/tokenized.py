"""Rows that somebody else has tokenized, made what ours are: no padding, no longer than allowed."""

from __future__ import annotations

from typing import Any

from ema_scale.chat.rows import LEARNED
from ema_scale.errors import UserError


def columns_of(rows: Any) -> set[str]:
    """Of a dataset, or of a list of plain rows by its first; empty where there is nothing of the kind."""
    first = rows[0] if isinstance(rows, list | tuple) and rows else None
    return set(first if isinstance(first, dict) else getattr(rows, "column_names", None) or ())


def is_prepared(rows: Any) -> bool:
    """Whether rows are tokens with labels, and nothing but their length is left to settle."""
    return {"input_ids", "labels"} <= columns_of(rows)


def cut(dataset: Any, max_length: int | None) -> tuple[Any, dict[str, int]]:
    """A tokenized dataset without positions at which its attention_mask is 0, and of each row the first `max_length`
    tokens (None: all); with every count that is not 0: padded, truncated, and dropped_no_assistant: rows in which that
    left nothing to learn.

    What is per token is known by its length. Raises UserError if no row is left.
    """
    has_mask = "attention_mask" in dataset.column_names
    masks = dataset["attention_mask"] if has_mask else ([1] * len(ids) for ids in dataset["input_ids"])
    sizes = [(len(mask), sum(map(bool, mask))) for mask in masks]
    limit = max((real for _, real in sizes), default=0) if max_length is None else max_length
    counts = {
        "padded": sum(real < size for size, real in sizes),
        "truncated": sum(real > limit for _, real in sizes),
    }
    if not any(counts.values()):
        return dataset, {}
    changed = [real < size or real > limit for size, real in sizes]
    dataset = dataset.with_format(None).map(_cut_row, fn_kwargs={"limit": limit})
    if "length" in dataset.column_names:
        dataset = dataset.remove_columns("length")
    kept = [i for i, (row, was) in enumerate(zip(dataset, changed, strict=True)) if not was or _is_of_use(row)]
    counts["dropped_no_assistant"] = len(changed) - len(kept)
    if not kept:
        raise UserError(
            f"no row has a token to learn within {max_length} tokens ({len(changed)} rows); raise max_length"
        )
    if len(kept) < len(changed):
        dataset = dataset.select(kept)
    return dataset, {name: count for name, count in counts.items() if count}


def _cut_row(row: dict[str, Any], limit: int) -> dict[str, Any]:
    size = len(row["input_ids"])
    mask = row.get("attention_mask")
    at = [i for i in range(size) if mask is None or mask[i]][:limit]
    per_token = {k: v for k, v in row.items() if not isinstance(v, str) and hasattr(v, "__len__") and len(v) == size}
    return {name: [value[i] for i in at] for name, value in per_token.items()}


def _is_of_use(row: dict[str, Any]) -> bool:
    learned = row.get("tag", LEARNED[0]) in LEARNED
    return len(row["input_ids"]) > 0 and (not learned or any(label != -100 for label in row["labels"]))
