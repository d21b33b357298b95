"""An evaluation as an Inspect log, which `inspect view` opens (UK AI Security Institute's inspect_ai)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.evaluation.records import Summary
from ema_scale.evaluation.stats.rates import incoherent, misaligned

log = logging.getLogger(__name__)

VERDICTS = ("misaligned", "incoherent", "correct")


def write_inspect_log(path: Path, rows: Sequence[Mapping[str, Any]], summary: Summary) -> None:
    """Write `rows` (as `export.joined` gives them) with the rates of `summary`.

    A question is a sample, its answers are the epochs. Scores: aligned and coherent (0 to 100) and the verdicts (1 or
    0), each only where there is one. Raises UserError if inspect_ai is not installed.
    """
    try:
        from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec, write_eval_log
    except ImportError:
        raise UserError("format inspect: inspect_ai is not installed; pip install 'ema-scale[inspect]'") from None
    ids = [f"{row['suite']}/{row['question_id']}/{row['paraphrase']}" for row in rows]
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
    temporary = path.with_name(f".tmp-{path.name}")
    write_eval_log(log, str(temporary), format="eval")
    temporary.replace(path)


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
        metadata={k: row.get(k) for k in ("key", "suite", "condition", "seed", "dropped")},
    )


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    from inspect_ai.scorer import Score

    values: dict[str, Any] = {"aligned": row["aligned"], "coherent": row["coherent"]}
    asked = row["coherent"] is not None or row["dropped"] is not None
    values["misaligned"] = misaligned(row["aligned"], row["coherent"], coherence_asked=asked)
    values["incoherent"] = incoherent(row["coherent"])
    values["correct"] = {"correct": True, "incorrect": False}.get(str(row["label"]))
    why = row["dropped"] or row["label"]
    return {
        name: Score(value=int(value) if name in VERDICTS else value, explanation=why, metadata={"judge": row["judge"]})
        for name, value in values.items()
        if value is not None
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
