"""Projections of rows onto a direction. They are appended to a file, from which a killed run continues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ema_scale.core.hashing import digest, file_sha256
from ema_scale.models.directions import Directions
from ema_scale.persona.states import BATCH_TOKENS, project_rows
from ema_scale.selection.kept_values import KeptValues
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

    path: where projections are kept, and found (see `KeptValues`), under digests of the row's tokens, the model and the
        direction. The caller holds the folder's lock.
    Raises UserError for directions of a model of another shape.
    """
    reader = digest(readers.identities[ALIGNED], file_sha256(directions.source), layer)
    known = KeptValues(path)
    # Rows of similar length together, as `project_rows` batches them.
    missing = sorted((item for item in items if (reader, item.key) not in known), key=lambda item: -len(item.ids))
    for start in range(0, len(missing), _ROWS_AT_ONCE):
        part = missing[start : start + _ROWS_AT_ONCE]
        with readers.reading(ALIGNED) as model:
            found = project_rows(
                model, readers.encoder.tokenizer, [item.row for item in part], directions, layer,
                max_length=readers.max_length, batch_tokens=batch_tokens or BATCH_TOKENS,
            )  # fmt: skip
        known.add(reader, [item.key for item in part], found)
    return [known[reader, item.key] for item in items]
