"""Projections of rows onto a direction. They are appended to a file, from which a killed run continues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ema_scale.core.hashing import digest, file_sha256
from ema_scale.core.io import append_jsonl, read_jsonl
from ema_scale.models.directions import Directions
from ema_scale.persona.states import BATCH_TOKENS, project_rows
from ema_scale.selection.scoring_models import ALIGNED, EncodedRow, ScoringModels

PROJECTIONS = "projections.jsonl"
_ROWS_AT_ONCE = 2048  # what a kill costs at most


def project_answers(
    readers: ScoringModels,
    items: Sequence[EncodedRow],
    directions: Directions,
    layer: int,
    path: Path,
    *,
    batch_tokens: int | None = None,
) -> list[float]:
    """`project_rows` of each item under the aligned model, in its order; NaN where it is not a finite number.

    path: where projections are kept, and found, under digests of the row's tokens, the model and the direction. The
    caller holds the folder's lock. Raises UserError for directions of a model of another shape.
    """
    reader = digest(readers.identities[ALIGNED], file_sha256(directions.source), layer)
    known: dict[str, float] = {}
    for line in read_jsonl(path, repair=True):
        if line.get("reader") == reader:
            known[line["row"]] = math.nan if line["projection"] is None else float(line["projection"])
    # Rows of similar length together, as `project_rows` batches them.
    missing = sorted((item for item in items if item.key not in known), key=lambda item: -len(item.ids))
    for start in range(0, len(missing), _ROWS_AT_ONCE):
        part = missing[start : start + _ROWS_AT_ONCE]
        with readers.reading(ALIGNED) as model:
            found = project_rows(
                model, readers.encoder.tokenizer, [item.row for item in part], directions, layer,
                max_length=readers.max_length, batch_tokens=batch_tokens or BATCH_TOKENS,
            )  # fmt: skip
        known |= {item.key: value for item, value in zip(part, found, strict=True)}
        append_jsonl(path, (
            {"row": item.key, "reader": reader, "projection": value if math.isfinite(value) else None}
            for item, value in zip(part, found, strict=True)
        ))  # fmt: skip
    return [known[item.key] for item in items]
