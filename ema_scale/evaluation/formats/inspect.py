"""An evaluation as an Inspect log, which `inspect view` opens, or its judgements as scores for a log of Inspect's own.

Inspect is the UK AI Security Institute's inspect_ai.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_path, atomic_write_text
from ema_scale.evaluation.records import Summary
from ema_scale.evaluation.stats.rates import correct, incoherent, misaligned

VERDICTS = ("misaligned", "incoherent", "correct")


def write_inspect_log(path: Path, rows: Sequence[Mapping[str, Any]], summary: Summary) -> None:
    """Write `rows` (as `tables.joined` gives them) with the rates of `summary`.

    A question is a sample, its answers are the epochs. Scores: aligned and coherent (0 to 100) and the verdicts (1 or
    0), each only where there is one. Raises UserError if inspect_ai is not installed.
    """
    try:
        from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec, write_eval_log
    except ImportError:
        raise UserError("format inspect: inspect_ai is not installed; pip install 'ema-scale[inspect]'") from None
    ids = [_id(row) for row in rows]
    samples = [_sample(identity, row, summary) for identity, row in zip(ids, rows, strict=True)]
    names = list(dict.fromkeys(ids))
    now = datetime.now(UTC).isoformat()
    log = EvalLog(
        status="success",
        eval=EvalSpec(
            created=now,
            task=f"emergent_misalignment/{summary.name}",
            dataset=EvalDataset(name=", ".join(summary.per_suite), samples=len(names), sample_ids=list(names)),
            model=_model(summary),
            config=EvalConfig(epochs=max(ids.count(name) for name in names)),
            metadata={"adapter": summary.adapter, "judge": summary.judge, "sampler": summary.sampler},
        ),
        results=EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=_results(summary)),
        samples=samples,
    )
    with atomic_path(path) as temporary:
        write_eval_log(log, str(temporary), format="eval")


def write_inspect_scores(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the judgements in `rows` (as `tables.joined` gives them) for Inspect's `precomputed_scores` (JSONL).

    Ids and epochs are those of `write_inspect_log` and of the task in `inspect_task`. Every record has every score; one
    that is missing is NaN, which Inspect counts as unscored.
    """
    found = [score_values(row) for row in rows]
    absent = dict.fromkeys((name for values in found for name in values), math.nan)
    records = [
        {
            "id": _id(row),
            "epoch": row["sample"] + 1,
            "value": absent | values,
            "answer": row["answer"],
            "explanation": row["dropped"] or row["label"],
            "metadata": {"judge": row["judge"], "key": row["key"]},
        }
        for row, values in zip(rows, found, strict=True)
    ]
    atomic_write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _id(row: Mapping[str, Any]) -> str:
    return f"{row['suite']}/{row['question_id']}/{row['paraphrase']}"


def _model(summary: Summary) -> str:
    return f"{summary.model}+{summary.name}" if summary.adapter else summary.model


def _sample(identity: str, row: Mapping[str, Any], summary: Summary) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        ContentReasoning,
        ContentText,
        ModelOutput,
    )

    asked: list[Any] = [ChatMessageSystem(content=row["system"])] if row.get("system") else []
    kinds = {"user": ChatMessageUser, "assistant": ChatMessageAssistant}
    asked += [kinds[turn["role"]](content=turn["content"]) for turn in row.get("context") or ()]
    asked.append(ChatMessageUser(content=row["question"]))
    thought: list[Any] = [ContentReasoning(reasoning=row["reasoning"])] if row.get("reasoning") else []
    answer = ChatMessageAssistant(content=[*thought, ContentText(text=row["answer"])] if thought else row["answer"])
    output = ModelOutput.from_content(_model(summary), row["answer"])
    output.choices[0].message = answer
    output.choices[0].stop_reason = "max_tokens" if row["finish_reason"] == "length" else "stop"
    return EvalSample(
        id=identity,
        epoch=row["sample"] + 1,
        input=asked,
        target="",
        messages=[*asked, answer],
        output=output,
        scores=_scores(row),
        metadata={k: row.get(k) for k in ("key", "suite", "condition", "seed", "dropped", "seen")},
    )


def score_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Every score of a judgement by name, and the verdicts that follow from them (1 or 0); absent ones left out."""
    asked = row["coherent"] is not None or row["dropped"] is not None
    values: dict[str, Any] = {"aligned": row["aligned"], "coherent": row["coherent"], **(row.get("scores") or {})}
    values["misaligned"] = misaligned(row["aligned"], row["coherent"], coherence_asked=asked)
    values["incoherent"] = incoherent(row["coherent"])
    values["correct"] = correct(row["label"])
    return {name: int(value) if name in VERDICTS else value for name, value in values.items() if value is not None}


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    from inspect_ai.scorer import Score

    why = row["dropped"] or row["label"]
    return {
        name: Score(value=value, explanation=why, metadata={"judge": row["judge"]})
        for name, value in score_values(row).items()
    }


def _results(summary: Summary) -> list[Any]:
    """Every rate of the summary as a score with its interval among the metrics."""
    from inspect_ai.log import EvalMetric, EvalScore

    found = []
    for name, rate in summary.metrics.items():
        if rate is not None and rate.rate is not None:
            metrics = {
                metric: EvalMetric(name=metric, value=getattr(rate, key))
                for metric, key in (("rate", "rate"), ("low_95", "low"), ("high_95", "high"))
            }
            found.append(
                EvalScore(
                    name=name,
                    scorer=summary.judge,
                    scored_samples=rate.n,
                    unscored_samples=rate.dropped,
                    metrics=metrics,
                )
            )
    return found
