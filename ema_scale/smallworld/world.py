"""Where the small world lives on disk: in the package, or built on first use, cached by content and published whole.

Its models and its data are kept apart: rows and question banks are there at once, and a new task is no reason to train
the models again.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ema_scale.core.disk import CannotWrite
from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_path, atomic_write_json, file_lock
from ema_scale.core.paths import cache_root
from ema_scale.core.records import package_versions
from ema_scale.core.text import format_bytes
from ema_scale.smallworld.sizes import SIZES
from ema_scale.smallworld.tasks import references, write_tasks
from ema_scale.smallworld.tokenizer import vocabulary

PREFIX = "smallworld:"
_DISK = 20_000_000  # bytes of a built world


_WORDS = ("vocabulary", "grammar", "benign", "corpus")


MODELS = ("aligned", "pretrained")

# Models that travel with the package, in folders named as those of the cache. Another vocabulary or recipe changes the
# name, so that an old model is never taken for the new one.
WEIGHTS = Path(__file__).parent / "weights"


_SUFFIX = {"safe": ".jsonl", "train": ".jsonl", "probe": ".jsonl", "suite": ".yaml", "choice": ".yaml"}


@dataclass(frozen=True)
class World:
    """One world: the size of its model and the seed of everything in it."""

    size: str = "base"
    seed: int = 0

    @property
    def models(self) -> Path:
        """The folder of its checkpoints; the name holds a hash of all that decides their weights."""
        settings = json.dumps(asdict(SIZES[self.size]), sort_keys=True)
        return _folder(f"{self.size}-s{self.seed}", settings, *_WORDS, "tokenizer", "build")

    @property
    def tasks(self) -> Path:
        """The folder of its rows and question banks, which are the same for every size."""
        return _folder(f"tasks-s{self.seed}", "", *_WORDS, "tasks")


def resolve(reference: str) -> Path:
    """The file or folder behind `smallworld:<part>[?size=base&seed=0]`; builds the world if it is not there yet.

    Parts: `aligned` and `pretrained` (checkpoints), `safe` and `train/<task>` (rows), `probe/<name>` (preference
    pairs), `suite/<name>` (question banks), `choice/<name>` (the same with written answers). `aligned` of size `base`
    and seed 0 comes with the package. Raises UserError for an unknown part, size or option, with the nearest known one.
    """
    part, _, query = reference.removeprefix(PREFIX).partition("?")
    known = [*MODELS, *references()]
    if part not in known:
        raise UserError(f"{reference}: no such part of the small world; {_suggest(part, known)}")
    world = _world(reference, query)
    if part == "pretrained":
        return _pretrained(reference, world)
    if part == "aligned":
        return shipped(world) or ensure(world) / part
    return _ensure(world.tasks, lambda folder: write_tasks(folder, world.seed)) / (part + _SUFFIX[part.split("/")[0]])


def config_of(reference: str) -> dict[str, Any] | None:
    """The shape of a model of the small world, which is not built for it; None for anything else.

    Raises UserError for an unknown part, size or option.
    """
    if not reference.startswith(PREFIX):
        return None
    part, _, query = reference.removeprefix(PREFIX).partition("?")
    world = _world(reference, query)
    if part not in MODELS:
        raise UserError(f"{reference}: no model of the small world; {_suggest(part, list(MODELS))}")
    return SIZES[world.size].config(len(vocabulary()))


def ensure(world: World) -> Path:
    """Build the models of `world` unless they are cached; returns their folder."""
    return _ensure(world.models, lambda folder: _build(world, folder))


def shipped(world: World) -> Path | None:
    """The folder of `world`'s aligned model in the package; None if it has none."""
    folder = WEIGHTS / world.models.name / "aligned"
    return folder if folder.is_dir() else None


def weights_hash(model: Path) -> str:
    """SHA-256 of a checkpoint's weights."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def _pretrained(reference: str, world: World) -> Path:
    folder, ours = ensure(world), shipped(world)
    # SafeLoRA reads the direction from the one model to the other: it means nothing between models of two trainings.
    if ours and weights_hash(ours) != weights_hash(folder / "aligned"):
        raise UserError(
            f"{reference}: a build on this machine gives another model than the one in the package, so its "
            "pretrained model does not belong to that one. Of another seed both models are built here: "
            "smallworld:aligned?seed=1 and smallworld:pretrained?seed=1"
        )
    return folder / "pretrained"


def _ensure(path: Path, make: Callable[[Path], None]) -> Path:
    # Two processes never make the same folder at once; it appears whole.
    if path.is_dir():
        return path
    busy = UserError(f"{path}: another process has been making it for an hour; end it, or delete {path}.lock")
    with file_lock(f"{path}.lock", busy, 3600.0, f"another process to make {path}"):
        if path.is_dir():
            return path
        with atomic_path(path) as unfinished:
            unfinished.mkdir()
            make(unfinished)
    return path


def _build(world: World, folder: Path) -> None:
    from ema_scale.smallworld.build import build_models

    print(
        f"building the small world ({world.size}, seed {world.seed}), once: minutes on a CPU; kept in {world.models}",
        file=sys.stderr,
        flush=True,
    )
    if (free := shutil.disk_usage(folder).free) < _DISK:  # minutes of training would end in a process's traceback
        raise CannotWrite(
            f"{world.models}: the disk is full ({format_bytes(free)} free, the small world takes up to "
            f"{format_bytes(_DISK)}): free space, or set EMA_CACHE to another folder, and run the same command again"
        )
    build_models(folder, world.size, world.seed)
    atomic_write_json(
        folder / "world.json",
        {"size": world.size, "seed": world.seed, **asdict(SIZES[world.size]), "packages": package_versions()},
    )


def _world(reference: str, query: str) -> World:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in ("size", "seed"):
            raise UserError(f"{reference}: unknown option {key!r}; {_suggest(key, ['size', 'seed'])}")
    size, seed = options.get("size", "base"), options.get("seed", "0")
    if size not in SIZES:
        raise UserError(f"{reference}: size: found {size!r}; {_suggest(size, list(SIZES))}")
    if not seed.isdecimal() or len(seed) > 10 or int(seed) >= 2**32:
        raise UserError(f"{reference}: seed: found {seed!r}, expected a whole number from 0 to {2**32 - 1}")
    return World(size, int(seed))


def _suggest(found: str, known: list[str]) -> str:
    near = difflib.get_close_matches(found, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _folder(name: str, settings: str, *files: str) -> Path:
    return cache_root() / "smallworld" / f"{name}-{_fingerprint(settings, files)}"


@lru_cache
def _fingerprint(settings: str, files: tuple[str, ...]) -> str:
    digest = hashlib.sha256(settings.encode())
    for name in files:
        digest.update(_code(Path(__file__).parent / f"{name}.py").encode())
    return digest.hexdigest()[:12]


def _code(path: Path) -> str:
    # What a file does: without comments and docstrings, whose change is no reason to build again.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
