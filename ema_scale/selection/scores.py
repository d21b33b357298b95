"""Likelihoods of rows under several readers: an append-only file that a killed run continues from.

One line a (row, reader): {"row", "reader", "nll", "tokens"}. Both names are digests of content, so a likelihood is
reused exactly when it would come out the same: with another data file, an adapter more, another selection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ema_scale.evaluation.progress import Progress
from ema_scale.rundir import append_jsonl, read_jsonl
from ema_scale.selection.readers import BATCH_TOKENS, Readers
from ema_scale.selection.rows import Item, batches

SCORES = "scores.jsonl"


def score(
    readers: Readers, items: Sequence[Item], path: Path | None = None, *, batch_tokens: int | None = None
) -> dict[str, list[float]]:
    """Reader -> mean negative log-likelihood (nats an answer token) of each item, in its order; NaN where it is not a
    finite number.

    path: where likelihoods are kept, and found; a torn last line is cut off. The caller holds the folder's lock.
    batch_tokens: with padding; None: what suits the device.
    Raises UserError for a file that holds something else.
    """
    known: dict[tuple[str, str], float] = {}
    if path is not None:
        for line in read_jsonl(path, repair=True):
            if "row" in line and "reader" in line:
                known[line["row"], line["reader"]] = math.nan if line.get("nll") is None else float(line["nll"])
    for name, identity in readers.identities.items():
        missing = [item for item in items if (item.key, identity) not in known]
        if not missing:
            continue
        shown = Progress(f"read by {name}", len(items), len(items) - len(missing), unit="row")
        with shown as progress, readers.merged(name):
            for batch in batches(missing, batch_tokens or BATCH_TOKENS[readers.device.type]):
                found = readers.nll(name, batch)
                known |= {(item.key, identity): nll for item, nll in zip(batch, found, strict=True)}
                if path is not None:
                    append_jsonl(path, (_line(item, identity, nll) for item, nll in zip(batch, found, strict=True)))
                progress.add(len(batch))
    return {name: [known[item.key, identity] for item in items] for name, identity in readers.identities.items()}


def _line(item: Item, identity: str, nll: float) -> dict[str, object]:
    value = nll if math.isfinite(nll) else None  # NaN is not JSON
    return {"row": item.key, "reader": identity, "nll": value, "tokens": sum(item.answered)}


def gap(aligned: float, misaligned: Sequence[float], eps: float) -> float:
    """s = (mean_k L_k - L_aligned) / (L_aligned + eps): how much less likely an answer is to misaligned models, in
    units of how unlikely it is at all (arXiv 2508.06249, Interleaving+). L, eps: nats. NaN if any L is not finite, or
    both L_aligned and eps are 0."""
    if aligned + eps == 0:
        return math.nan
    value = (sum(misaligned) / len(misaligned) - aligned) / (aligned + eps)
    return value if math.isfinite(value) else math.nan
