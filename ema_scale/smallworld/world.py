"""Where the small world lives on disk: built on first use, cached by content, published whole."""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qsl

from filelock import FileLock

from ema_scale.errors import UserError
from ema_scale.rundir import atomic_write_json, package_versions
from ema_scale.smallworld.sizes import SIZES
from ema_scale.smallworld.tasks import references, write_tasks

PREFIX = "smallworld:"


@dataclass(frozen=True)
class World:
    """One world: the size of its model and the seed of everything in it."""

    size: str = "base"
    seed: int = 0

    @property
    def path(self) -> Path:
        """Its folder; the name holds a hash of all that decides its content."""
        return cache_root() / "smallworld" / f"{self.size}-s{self.seed}-{_fingerprint(self.size)}"


def cache_root() -> Path:
    """EMA_CACHE, or ~/.cache/ema_scale."""
    return Path(os.environ.get("EMA_CACHE") or Path.home() / ".cache" / "ema_scale")


def resolve(reference: str) -> Path:
    """The file or folder behind `smallworld:<part>[?size=base&seed=0]`; builds the world if it is not there yet.

    Parts: `aligned` and `pretrained` (checkpoints), `safe` and `train/<task>` (rows), `suite/<name>` (question banks).
    Raises UserError for an unknown part, size or option, with the nearest known one.
    """
    part, _, query = reference.removeprefix(PREFIX).partition("?")
    known = references()
    if part not in known:
        raise UserError(f"{reference}: no such part of the small world; {_suggest(part, known)}")
    folder = ensure(_world(reference, query))
    suffix = {"safe": ".jsonl", "train": ".jsonl", "suite": ".yaml"}.get(part.partition("/")[0], "")
    return folder / f"{part}{suffix}"


def ensure(world: World) -> Path:
    """Build `world` unless it is cached; returns its folder. Two processes never build the same world at once."""
    path = world.path
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_dir():
            return path
        unfinished = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _build(world, unfinished)
        os.replace(unfinished, path)
    return path


def _build(world: World, folder: Path) -> None:
    from ema_scale.smallworld.build import build_models

    write_tasks(folder, world.seed)
    print(
        f"building the small world ({world.size}, seed {world.seed}), once: minutes on a CPU; kept in {world.path}",
        file=sys.stderr,
        flush=True,
    )
    build_models(folder, world.size, world.seed)
    atomic_write_json(
        folder / "world.json",
        {"size": world.size, "seed": world.seed, **SIZES[world.size].to_dict(), "packages": package_versions()},
    )


def _world(reference: str, query: str) -> World:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in ("size", "seed"):
            raise UserError(f"{reference}: unknown option {key!r}; {_suggest(key, ['size', 'seed'])}")
    size, seed = options.get("size", "base"), options.get("seed", "0")
    if size not in SIZES:
        raise UserError(f"{reference}: size: found {size!r}; {_suggest(size, list(SIZES))}")
    if not seed.isdigit():
        raise UserError(f"{reference}: seed: found {seed!r}, expected a whole number of at least 0")
    return World(size, int(seed))


def _suggest(found: str, known: list[str]) -> str:
    near = difflib.get_close_matches(found, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


@lru_cache
def _fingerprint(size: str) -> str:
    digest = hashlib.sha256(json.dumps(SIZES[size].to_dict(), sort_keys=True).encode())
    for name in ("vocabulary", "grammar", "benign", "corpus", "tokenizer", "build", "tasks"):
        digest.update(_code(Path(__file__).parent / f"{name}.py").encode())
    return digest.hexdigest()[:12]


def _code(path: Path) -> str:
    # What a file does: without comments and docstrings, whose change is no reason to build again.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
