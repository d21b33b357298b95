"""Rank safe rows by the perplexity gap between the aligned model and misaligned ones (Interleaving+ and ++)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_json, atomic_write_text
from ema_scale.core.records import package_versions
from ema_scale.core.run_dir import RunDir
from ema_scale.core.uri import locate
from ema_scale.data.rows import load_rows
from ema_scale.defenses.interleaving_plus import MADE_BY, provenance_path
from ema_scale.selection.refusals import refusals as refusal_rule
from ema_scale.selection.scoring_models import (
    ALIGNED,
    SCORES,
    DropLog,
    EncodedRow,
    ScoringModels,
    adapter_folder,
    gap,
    read_items,
    score,
)

FORMULA = (
    "s = (mean_k L_k - L_aligned) / (L_aligned + eps); L: mean negative log-likelihood of the answer, nats per token"
)
KEEP_REFUSALS = "keep"


@dataclass(frozen=True)
class Ranked:
    """One row with its score and the likelihoods behind it."""

    item: EncodedRow
    score: float
    nll: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        row = self.item.row
        kept = {"messages": [dict(m) for m in row.messages], "tools": list(row.tools), "domain": row.domain}
        own = {"score": self.score, "nll": self.nll, "origin": row.origin}
        return {name: value for name, value in kept.items() if value} | own


@dataclass(frozen=True)
class Selection:
    """ranked: what was written, best first; account: what was left out; provenance: what stands beside the file."""

    ranked: list[Ranked]
    account: DropLog
    provenance: dict[str, Any]


def select(
    source: str,
    model: ModelRecipe,
    adapters: Mapping[str, str],
    out: Path,
    *,
    leave_out: Sequence[str] = (),
    refusals: str = KEEP_REFUSALS,
    eps: float = 1.0,
    keep: int | None = None,
    limit: int | None = None,
    max_length: int = 2048,
    batch_tokens: int | None = None,
) -> Selection:
    """Rank the rows of `source`, highest gap first, and write `out` (JSONL) and its provenance beside it.

    adapters: domain -> misaligned LoRA adapter of `model`, or its run folder; those of the domains in leave_out do not
    vote. refusals: `keep` (Interleaving+), or a rule for what to drop (++, see `refusals.refusals`). keep: at most so
    many rows. Likelihoods go to scores.jsonl in out's folder, where any later selection finds them: a killed one goes
    on. Rows that are not ranked are listed in <out>.left_out.jsonl with the reason.
    Raises UserError for adapters that do not fit, a source without a usable row, and a folder that is in use.
    """
    if not (eps >= 0 and math.isfinite(eps)):
        raise UserError(f"eps: found {eps}, expected nats, 0 or more")
    if out.is_dir():
        raise UserError(f"{out}: is a folder, expected a file to write, such as {out / 'safe.jsonl'}")
    voting = voting_adapters(adapters, leave_out)
    rule = None if refusals == KEEP_REFUSALS else refusal_rule(refusals)
    rows = load_rows(locate(source), limit=limit, on_bad="drop")
    readers = ScoringModels(model, voting)
    with RunDir(out.parent).lock():
        items, account = read_items(rows, readers.encoder, min(max_length, readers.max_length))
        if rule is not None:
            items = _without_refusals(items, rule.find([item.row for item in items]), account)
        ranked = _rank(items, score(readers, items, out.parent / SCORES, batch_tokens=batch_tokens), eps, account)
        text = "".join(json.dumps(r.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for r in ranked[:keep])
        provenance = {
            "schema": 1,
            "made_by": MADE_BY,
            "variant": "+" if rule is None else "++",
            "formula": FORMULA,
            "eps": eps,
            "refusals": "kept" if rule is None else rule.rule,
            "source": source,
            "source_sha256": rows.sha256,
            "model": {**model.model_dump(mode="json"), "identity": readers.identities[ALIGNED]},
            "adapters": {name: described(path, readers.identities[name]) for name, path in voting.items()},
            "not_voting": sorted(set(adapters) - set(voting)),
            "max_length": min(max_length, readers.max_length),
            "rows": {"read": account.read, **account.counts, "ranked": len(ranked), "kept": len(ranked[:keep])},
        }
        _write(out, text, provenance, account)
    return Selection(ranked[:keep], account, provenance)


def voting_adapters(adapters: Mapping[str, str], leave_out: Sequence[str] = ()) -> dict[str, str]:
    """The adapters that read. Raises UserError if none is left, and for a name that cannot stand beside `aligned`."""
    for name in leave_out:
        if name not in adapters:
            raise UserError(f"leave_out: found {name!r}, expected one of the adapters {', '.join(adapters)}")
    voting = {name: path for name, path in adapters.items() if name not in leave_out}
    if not voting:
        raise UserError("found no misaligned adapter that may vote; expected at least one, of another domain")
    wrong = [name for name in voting if name == ALIGNED or "." in name or not name]
    if wrong:
        raise UserError(f"adapters: found the name {wrong[0]!r}; expected a domain, without dots, other than {ALIGNED}")
    return voting


def _without_refusals(items: list[EncodedRow], refused: Sequence[bool], account: DropLog) -> list[EncodedRow]:
    for item, drop in zip(items, refused, strict=True):
        if drop:
            account.leave_out("refusal", item.row.origin, "a refusal by the stated rule")
    kept = [item for item, drop in zip(items, refused, strict=True) if not drop]
    if not kept:
        raise UserError(f"nothing left to rank; {account.line()}")
    return kept


def _rank(items: Sequence[EncodedRow], nll: Mapping[str, list[float]], eps: float, account: DropLog) -> list[Ranked]:
    ranked = []
    for place, item in enumerate(items):
        found = {name: values[place] for name, values in nll.items()}
        value = gap(found[ALIGNED], [x for name, x in found.items() if name != ALIGNED], eps)
        if math.isnan(value):
            account.leave_out("not finite", item.row.origin, f"likelihoods {found}")
        else:
            ranked.append(Ranked(item, value, found))
    if not ranked:
        raise UserError(f"nothing left to rank; {account.line()}")
    return sorted(ranked, key=lambda one: (-one.score, one.item.key))


def described(path: str, identity: str) -> dict[str, Any]:
    """trained_on: hashes of the data, where the adapter lies in a run folder of ours."""
    run = RunDir(Path(adapter_folder(locate(path))).parent)
    trained: list[str] = []
    if made := run.provenance():
        trained = sorted(made.data_sha256.values())
    return {"path": path, "identity": identity, "trained_on": trained}


def _write(out: Path, text: str, provenance: dict[str, Any], account: DropLog) -> None:
    left = [
        {"why": why, "origin": dropped.origin, "reason": dropped.reason}
        for why, rows in account.left_out.items()
        for dropped in rows
    ]
    atomic_write_text(out.with_suffix(".left_out.jsonl"), "".join(json.dumps(row) + "\n" for row in left))
    atomic_write_text(out, text)
    provenance |= {
        "file": out.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "packages": package_versions(),
        "written": time.time(),
    }
    atomic_write_json(provenance_path(out), provenance)
