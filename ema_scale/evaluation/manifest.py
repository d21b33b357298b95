"""What an evaluation folder was asked: kept beside its answers, so that they can be judged again with nothing else."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.assignment import assign
from ema_scale.evaluation.plan import EvalTarget, PromptGroup
from ema_scale.evaluation.records import MANIFEST_FILE, Manifest, Sample
from ema_scale.evaluation.suites import Suite


def has_manifest(folder: Path, expected: Manifest) -> bool:
    """Whether asked.json is there and says the same."""
    stored = Manifest.read_if_valid(folder / MANIFEST_FILE)
    return stored is not None and _comparable(stored) == _comparable(expected)


def _comparable(manifest: Manifest) -> object:
    return json.loads(json.dumps(manifest.to_json()))


def read_manifest(folder: Path) -> Manifest:
    """Read asked.json. Raises UserError if it is not there or not such a file."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise UserError(
            f"{folder}: found no {MANIFEST_FILE}; run `ema eval` there once more "
            "(what is sampled is kept), then judge again"
        )
    return Manifest.read(path)


@dataclass(frozen=True)
class StoredGroup(PromptGroup):
    """Answers that are there, however many."""

    stored: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        return list(self.stored)


def stored_groups(
    manifest: Manifest, samples: Iterable[Sample], folder: Path, suites: Sequence[Suite]
) -> list[PromptGroup]:
    """The stored answers by suite, question and paraphrase, each with the judge that `manifest.settings` give it.

    suites: those of `manifest`, or the same under another judge. Raises UserError if a row's question is not among
    them, or a judge cannot judge it.
    """
    rows: dict[tuple[str, str, int], list[Sample]] = defaultdict(list)
    for row in samples:
        rows[row.suite, row.question_id, row.paraphrase].append(row)
    target = EvalTarget(manifest.target, Path(manifest.adapter) if manifest.adapter else None, folder)
    settings, groups = manifest.settings, list[PromptGroup]()
    for suite in suites:
        for question in suite.questions:
            for paraphrase in range(len(question.paraphrases)):
                found = rows.pop((suite.name, question.id, paraphrase), [])
                if not found:
                    continue
                found.sort(key=lambda row: row.sample)
                first = found[0]
                groups.append(
                    StoredGroup(
                        target=target,
                        suite=suite,
                        question=question,
                        paraphrase=paraphrase,
                        n=len(found),
                        digest=first.key.rpartition("#")[2],
                        seed=(first.seed or 0) - first.sample,
                        temperature=settings.temperature if question.temperature is None else question.temperature,
                        top_p=settings.top_p,
                        max_tokens=question.max_tokens or settings.max_tokens,
                        judge=assign(suite, question, settings.judge),
                        stored=tuple(row.key for row in found),
                    )
                )
    if rows:
        raise UserError(
            f"{folder}: answers to {next(iter(rows))} are there, but {MANIFEST_FILE} does not know that question"
        )
    return groups
