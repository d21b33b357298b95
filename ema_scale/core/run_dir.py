"""The folder of one run: where its files lie, its status, and the lock that lets one process write at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ema_scale.core.disk import make_folder
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.core.io import file_lock
from ema_scale.core.records import STATES, Provenance, RunStatus, TrainedQuestions

# Of a status these say how a state ended; a later state does not inherit them.
_OF_ONE_STATE = ("state", "updated", "step", "reason", "stopped_early", "adapter")

STUDY = "study.yaml"  # by which a study's folder is known

_LEVELS = 5  # from eval/checkpoints/<step>/adapter to the run's folder


class FolderInUse(UserError):
    """Another process writes to this run folder. The run itself has not failed."""


class RunDir:
    """The folder of one run; see ARCHITECTURE.md for its layout."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def provenance_path(self) -> Path:
        return self.path / "provenance.json"

    @property
    def status_path(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def data_path(self) -> Path:
        return self.path / "data.json"

    @property
    def questions_path(self) -> Path:
        return self.path / "questions.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def eval_dir(self) -> Path:
        return self.path / "eval"

    def create(self) -> RunDir:
        """Raises CannotWrite if a file is in its place, or the disk refuses."""
        make_folder(self.path)
        return self

    def provenance(self) -> Provenance | None:
        """What made this run; None if it never started. Raises UserError for a damaged file."""
        return Provenance.read(self.provenance_path)

    def status(self) -> RunStatus:
        """The last status; `not started` without a file. Raises UserError for a damaged file."""
        return RunStatus.read(self.status_path) or RunStatus()

    @property
    def adapter_weights(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    def describe_adapter(self) -> dict[str, Any]:
        """Size and hash of the adapter's weights, for `set_status`."""
        return {"bytes": self.adapter_weights.stat().st_size, "sha256": file_sha256(self.adapter_weights)}

    def check_adapter(self, whole: bool = True) -> None:
        """Raises UserError if a finished run's adapter is not the one that the training wrote.

        whole: compare its hash; else only its size.
        """
        known, weights = self.status().adapter, self.adapter_weights
        if known is None:  # not finished, or by an earlier version
            return
        if not weights.is_file():
            found = "no such file"
        elif weights.stat().st_size != known["bytes"]:
            found = f"found {weights.stat().st_size} bytes, expected {known['bytes']}"
        elif whole and file_sha256(weights) != known["sha256"]:
            found = "has other bytes"
        else:
            return
        raise UserError(
            f"{weights}: {found}: not the adapter that the training wrote; restore it, or train the run again "
            "(ema train --no-resume)"
        )

    def set_status(self, state: str, *, keep: bool = False, **details: Any) -> None:
        """Replace status.json. Raises ValueError for an unknown state.

        Args:
            keep: keep what the last status says of the run as a whole: when it started, its processes, its steps.
            details: further fields of RunStatus.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r} is not one of {STATES}")
        known = self.status().model_dump(exclude=set(_OF_ONE_STATE), exclude_none=True) if keep else {}
        RunStatus(**{**known, **details, "state": state, "updated": time.time()}).write(self.status_path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this folder for one writing process. Raises FolderInUse if another process does."""
        self.create()
        busy = f"{self.path}: another process is writing to this run folder; wait or choose another name"
        with file_lock(self.path / ".lock", FolderInUse(busy)):
            yield


def is_run(path: Path) -> bool:
    """Whether `path` is a run folder: one that holds the recipe it was made from."""
    return RunDir(path).recipe_path.is_file()


def trained_questions(*places: Path | str) -> TrainedQuestions | None:
    """What users ask in the rows of the run in whose folder one of `places` lies; None if that was not written.

    Raises UserError for a damaged file.
    """
    for place in places:
        path = Path(place).resolve()
        for folder in [path, *path.parents][:_LEVELS]:
            if is_run(folder) and (found := TrainedQuestions.read(RunDir(folder).questions_path)) is not None:
                return found
    return None
