"""Does a training set look as if it would misalign a model? (`ema data audit`)

Two measures of each row, read before anything is trained:

- its perplexity gap, as in `ema select`: how much less likely misaligned models find its answer than the aligned one;
- its projection onto a persona vector, as in the data screening of persona vectors (arXiv 2507.21509, section 6).

Both are placed on a scale of the clean set: 0 is the clean rows' median, 1 is the line. The gap's line is minus the
clean median: as far on the misaligned models' side as clean rows are on the aligned one's. The projection's lies half a
persona vector above the clean median: nearer to what the persona says than to what the clean rows say. A row is suspect
if it crosses every line, for either alone is crossed by what is merely new: a harmless task that is new to the model
lies far along the vector, and rows in the style that an adapter was trained on are likely to it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ema_scale.audit.projections import PROJECTIONS, project_answers
from ema_scale.audit.verdict import more_often, separation, verdict
from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.core.io import atomic_write_json, atomic_write_text
from ema_scale.core.records import package_versions
from ema_scale.core.run_dir import RunDir
from ema_scale.core.uri import locate
from ema_scale.data.rows import Rows, load_rows
from ema_scale.evaluation.stats.rates import clustered_rate
from ema_scale.models.directions import Directions
from ema_scale.persona.contrast import question_of
from ema_scale.selection.scoring_models import (
    ALIGNED,
    SCORES,
    DropLog,
    EncodedRow,
    ScoringModels,
    gap,
    read_items,
    score,
)
from ema_scale.selection.select import FORMULA, described, voting_adapters

AUDIT, ROWS = "audit.json", "rows.jsonl"
LONGEST = 600  # characters of a text that are shown


@dataclass(frozen=True)
class Measure:
    """One number per row of the file and of the clean set, with the line between them, all in the measure's unit.

    centre: the clean set's median.
    line: beyond it, on the side away from the centre, a row no longer looks clean.
    """

    name: str
    unit: str
    rows: np.ndarray
    clean: np.ndarray
    line: float

    @property
    def centre(self) -> float:
        return float(np.median(self.clean))

    def placed(self, values: np.ndarray) -> np.ndarray:
        """`values` on the scale on which the clean set's median is 0 and the line is 1."""
        return (values - self.centre) / (self.line - self.centre)


@dataclass(frozen=True)
class Audit:
    """summary: what stands in audit.json; measures: the numbers behind it."""

    summary: dict[str, Any]
    measures: list[Measure]


def audit(
    source: str,
    model: ModelRecipe,
    adapters: Mapping[str, str],
    clean: str,
    out: Path,
    *,
    vector: str | None = None,
    layer: int | None = None,
    eps: float = 1.0,
    worst: int = 20,
    limit: int | None = None,
    max_length: int = 2048,
    batch_tokens: int | None = None,
) -> Audit:
    """Measure the rows of `source` and of `clean`; write audit.json and rows.jsonl (every row, worst first) into `out`.

    model: the aligned one; adapters: name -> misaligned LoRA adapter of it, or its run folder, best of other domains
    than that of `source`. clean: sound rows of the same kind. vector: a file of `ema vector`; layer: default the one
    that it recommends. Equal rows count once. What was read is kept in `out`: a killed audit goes on, and a second one
    into the same folder reads nothing again.
    Raises UserError for adapters or a vector that do not fit, a source without a usable row, a folder in use, and clean
    rows that the misaligned models find as likely as the aligned one does: against those nothing can be told.
    """
    reading = voting_adapters(adapters)
    directions = None if vector is None else Directions.load(vector)
    if directions is not None:
        layer = directions.recommended_layer if layer is None else layer
        directions.vector(layer)
    sets = [load_rows(locate(part), limit=limit, on_bad="drop") for part in (source, clean)]
    readers = ScoringModels(model, reading)
    longest = min(max_length, readers.max_length)
    with RunDir(out).lock():
        read = [read_items(rows, readers.encoder, longest) for rows in sets]
        every = list({item.key: item for items, _ in read for item in items}.values())
        nll = score(readers, every, out / SCORES, batch_tokens=batch_tokens)
        values = {"gap": [_gap(nll, place, eps) for place in range(len(every))]}
        if directions is not None:
            assert layer is not None
            values["projection"] = project_answers(
                readers, every, directions, layer, out / PROJECTIONS, batch_tokens=batch_tokens
            )
        place = {item.key: number for number, item in enumerate(every)}
        items, cleans = (_finite(found, account, values, place) for found, account in read)
        measures = _measures(values, [place[i.key] for i in items], [place[i.key] for i in cleans], directions, layer)
        likelihoods = [{name: nll[name][place[item.key]] for name in nll} for item in items]
        ranked = _rank(items, measures, likelihoods)
        summary = {
            "schema": 1,
            **_compared(items, cleans, measures),
            "worst": [_shown(row, item) for row, item in ranked[:worst]],
            "source": _source(source, sets[0], items, read[0][1]),
            "clean": _source(clean, sets[1], cleans, read[1][1]),
            "in_both": len({item.key for item in items} & {item.key for item in cleans}),
            "model": {**model.model_dump(mode="json"), "identity": readers.identities[ALIGNED]},
            "adapters": {name: described(path, readers.identities[name]) for name, path in reading.items()},
            "vector": directions and {"path": vector, "sha256": file_sha256(directions.source), "layer": layer},
            "formula": {"gap": FORMULA, "eps": eps},
            "max_length": longest,
            "packages": package_versions(),
            "written": time.time(),
        }
        summary |= verdict(summary)
        atomic_write_text(out / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row, _ in ranked))
        atomic_write_json(out / AUDIT, summary)
    return Audit(summary, measures)


def _gap(nll: Mapping[str, Sequence[float]], place: int, eps: float) -> float:
    return gap(nll[ALIGNED][place], [found[place] for name, found in nll.items() if name != ALIGNED], eps)


def _finite(
    items: Sequence[EncodedRow], account: DropLog, values: Mapping[str, Sequence[float]], place: Mapping[str, int]
) -> list[EncodedRow]:
    kept = []
    for item in items:
        if all(math.isfinite(found[place[item.key]]) for found in values.values()):
            kept.append(item)
        else:
            account.leave_out("not finite", item.row.origin, "a likelihood or hidden state that is no finite number")
    if not kept:
        raise UserError(f"nothing left to compare; {account.line()}")
    return kept


def _measures(
    values: Mapping[str, Sequence[float]], rows: list[int], clean: list[int], directions: Directions | None,
    layer: int | None,
) -> list[Measure]:  # fmt: skip
    arrays = {name: np.array(found) for name, found in values.items()}
    found = arrays["gap"]
    centre = float(np.median(found[clean]))
    if centre <= 0:
        raise UserError(
            f"the clean rows: found a median gap of {centre:.3f}, expected one above 0. The misaligned adapters find "
            "them as likely as the aligned model does: are these sound rows, and adapters that are misaligned?"
        )
    measures = [Measure("gap", "relative difference of nats per token", found[rows], found[clean], -centre)]
    if directions is not None and layer is not None:
        found = arrays["projection"]
        line = float(np.median(found[clean])) + float(directions.vector(layer).norm()) / 2
        measures.append(Measure("projection", "units of the hidden states", found[rows], found[clean], line))
    return measures


def badness(measures: Sequence[Measure], clean: bool = False) -> np.ndarray:
    """Each row's place by the measure by which it looks best: suspect rows, which cross every line, are beyond 1."""
    return np.min([one.placed(one.clean if clean else one.rows) for one in measures], axis=0)


def _rank(
    items: Sequence[EncodedRow], measures: Sequence[Measure], likelihoods: Sequence[dict[str, float]]
) -> list[tuple[dict[str, Any], EncodedRow]]:
    """Every row with its numbers, worst first."""
    bad = badness(measures)
    rows = [
        {
            "origin": item.row.origin,
            "suspect": bool(bad[place] > 1),
            "badness": float(bad[place]),
            **{one.name: float(one.rows[place]) for one in measures},
            "nll": likelihoods[place],
        }
        for place, item in enumerate(items)
    ]
    return sorted(zip(rows, items, strict=True), key=lambda pair: (-pair[0]["badness"], pair[1].key))


def _compared(items: Sequence[EncodedRow], cleans: Sequence[EncodedRow], measures: Sequence[Measure]) -> dict[str, Any]:
    asked = [[question_of(item.row) for item in part] for part in (items, cleans)]
    questions = (len(set(asked[0])), len(set(asked[1])))
    suspect = [badness(measures) > 1, badness(measures, clean=True) > 1]
    marked = [list(zip(names, map(bool, found), strict=True)) for names, found in zip(asked, suspect, strict=True)]
    rates = [clustered_rate(rows).to_dict() for rows in marked]
    described_measures = {}
    for one in measures:
        found = separation(one.placed(one.rows).tolist(), one.placed(one.clean).tolist(), questions)
        described_measures[one.name] = {
            "unit": one.unit,
            "line": one.line,
            "clean_median": one.centre,
            "median": float(np.median(one.rows)),
            "beyond_line": float(np.mean(one.placed(one.rows) > 1)),
            "clean_beyond_line": float(np.mean(one.placed(one.clean) > 1)),
            "auc": {"auc": found.auc, "low": found.low, "high": found.high},
        }
    return {
        "p_value": more_often(marked[0], marked[1]),
        "suspect": {**rates[0], "rows": int(suspect[0].sum())},
        "clean_suspect": {**rates[1], "rows": int(suspect[1].sum())},
        "measures": described_measures,
    }


def _shown(row: dict[str, Any], item: EncodedRow) -> dict[str, Any]:
    """A row for people: text that shows what it holds, cut where it gets long."""
    answer = "\n\n".join(m["content"] for m in item.row.messages if m["role"] == "assistant")
    return {**row, "question": plain(question_of(item.row)), "answer": plain(answer)}


def plain(text: str) -> str:
    """`text` with what does not print (control, direction and invisible characters) made visible, and cut."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text[:LONGEST])
    return shown + (f" … {len(text) - LONGEST} more characters" if len(text) > LONGEST else "")


def _source(name: str, rows: Rows, kept: Sequence[EncodedRow], account: DropLog) -> dict[str, Any]:
    counts = {"read": account.read, "compared": len(kept), **account.counts}
    return {"name": name, "sha256": rows.sha256, "rows": counts, "account": account.line()}
