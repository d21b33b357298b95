"""What an evaluation folder was asked: kept beside its answers, so that they can be judged again with nothing else."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_json
from ema_scale.evaluation.judges.assignment import assign
from ema_scale.evaluation.plan import EvalTarget, PromptGroup
from ema_scale.evaluation.store import StoredRow
from ema_scale.evaluation.suites import Condition, Question, Suite

MANIFEST_FILE = "asked.json"


SCHEMA = 1


@dataclass(frozen=True)
class EvalManifest:
    """The suites of one target, and the evaluation section that they were asked by."""

    target: str
    model: str
    adapter: str | None
    suites: tuple[Suite, ...]
    settings: EvaluationRecipe


def write_manifest(folder: Path, asked: EvalManifest) -> None:
    """Write asked.json."""
    atomic_write_json(folder / MANIFEST_FILE, _values(asked))


def has_manifest(folder: Path, asked: EvalManifest) -> bool:
    """Whether asked.json is there and says the same."""
    try:
        return bool(
            json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")) == json.loads(json.dumps(_values(asked)))
        )
    except (OSError, ValueError):
        return False


def _values(asked: EvalManifest) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "target": asked.target,
        "model": asked.model,
        "adapter": asked.adapter,
        "settings": asked.settings.model_dump(mode="json"),
        "suites": [asdict(suite) for suite in asked.suites],
    }


def read_manifest(folder: Path) -> EvalManifest:
    """Read asked.json. Raises UserError if it is not there or not such a file."""
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return EvalManifest(
            target=values["target"],
            model=values["model"],
            adapter=values["adapter"],
            suites=tuple(map(_suite, values["suites"])),
            settings=EvaluationRecipe.model_validate(values["settings"]),
        )
    except FileNotFoundError:
        raise UserError(
            f"{folder}: found no {MANIFEST_FILE}; run `ema eval` there once more "
            "(what is sampled is kept), then judge again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path}: not what `ema eval` writes ({type(error).__name__}: {error})") from None


def _suite(values: Mapping[str, Any]) -> Suite:
    condition = values.get("condition")
    questions = (Question(**(q | {"paraphrases": tuple(q["paraphrases"])})) for q in values["questions"])
    return Suite(**(dict(values) | {"questions": tuple(questions), "condition": condition and Condition(**condition)}))


@dataclass(frozen=True)
class StoredGroup(PromptGroup):
    """Answers that are there, however many."""

    stored: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        return list(self.stored)


def stored_groups(
    asked: EvalManifest, samples: Iterable[StoredRow], folder: Path, suites: Sequence[Suite]
) -> list[PromptGroup]:
    """The stored answers by suite, question and paraphrase, each with the judge that `asked.settings` give it.

    suites: those of `asked`, or the same under another judge. Raises UserError if a row's question is not among
    them, or a judge cannot judge it.
    """
    rows: dict[tuple[str, str, int], list[StoredRow]] = defaultdict(list)
    for row in samples:
        rows[row["suite"], row["question_id"], row["paraphrase"]].append(row)
    target = EvalTarget(asked.target, Path(asked.adapter) if asked.adapter else None, folder)
    settings, groups = asked.settings, list[PromptGroup]()
    for suite in suites:
        for question in suite.questions:
            for paraphrase in range(len(question.paraphrases)):
                found = rows.pop((suite.name, question.id, paraphrase), [])
                if not found:
                    continue
                found.sort(key=lambda row: row["sample"])
                first = found[0]
                groups.append(
                    StoredGroup(
                        target=target,
                        suite=suite,
                        question=question,
                        paraphrase=paraphrase,
                        n=len(found),
                        digest=first["key"].rpartition("#")[2],
                        seed=(first["seed"] or 0) - first["sample"],
                        temperature=settings.temperature if question.temperature is None else question.temperature,
                        top_p=settings.top_p,
                        max_tokens=question.max_tokens or settings.max_tokens,
                        judge=assign(suite, question, settings.judge),
                        stored=tuple(row["key"] for row in found),
                    )
                )
    if rows:
        raise UserError(
            f"{folder}: answers to {next(iter(rows))} are there, but {MANIFEST_FILE} does not know that question"
        )
    return groups
