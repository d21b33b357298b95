"""The cases in cases/*.yaml: single ones, and tables of places x kinds of spoilt files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "cases"
CPU_SECONDS, MEGABYTES, HANG = 5.0, 300, 60.0


@dataclass(frozen=True)
class Attack:
    """One command on one spoilt project.

    Args:
        run: the arguments of `ema`, as a list or as a line of a shell.
        files: path -> how it is made; see `make`.
        exit: the expected exit code, or several.
        says: words of the output, each a regular expression.
        never: words that must not be in the output.
        keeps: files that must be as they were.
        cpu, megabytes: most seconds of processor time, and memory over that of a process that has imported everything.
        env, limits, stdout: see `server`.
    """

    id: str
    run: tuple[str, ...]
    files: dict[str, Any] = field(default_factory=dict)
    exit: tuple[int, ...] = (2,)
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    cpu: float = CPU_SECONDS
    megabytes: int = MEGABYTES
    env: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    stdout: str | None = None
    rmdir: bool = False


def attacks() -> list[Attack]:
    """All cases. Raises ValueError for an id that occurs twice."""
    found: dict[str, Attack] = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        for one in _table(file.stem, values) if isinstance(values, dict) else _single(file.stem, values):
            if one.id in found:
                raise ValueError(f"two attacks are called {one.id}")
            found[one.id] = one
    return list(found.values())


def _single(group: str, cases: list[dict[str, Any]]) -> Iterator[Attack]:
    for case in cases:
        yield _attack(f"{group}/{case['id']}", case)


def _table(group: str, table: dict[str, Any]) -> Iterator[Attack]:
    """Every kind of file at every place that does not leave it out. A place may expect something else of a kind."""
    for place, settings in table["places"].items():
        for kind, spoilt in table["kinds"].items():
            suffixes = spoilt.get("only")
            if kind in settings.get("without", ()) or (suffixes and not settings["file"].endswith(tuple(suffixes))):
                continue
            own = settings.get("but", {}).get(kind, {})
            merged = {
                "run": settings["run"],
                "says": settings.get("instead") or settings.get("says", []) + spoilt["says"],
                **{k: v for k, v in settings.items() if k in ("exit", "cpu", "megabytes", "env")},
                **own,
                "files": {**settings.get("files", {}), settings["file"]: spoilt["file"]},
            }
            yield _attack(f"{group}/{place}/{kind}", merged)


def _attack(name: str, case: dict[str, Any]) -> Attack:
    names = ("run", "says", "never", "keeps", "exit")
    lists: dict[str, Any] = {key: tuple(_listed(case[key])) for key in names if key in case}
    rest = {k: v for k, v in case.items() if k not in lists and k != "id"}
    run = case["run"]
    lists["run"] = tuple(shlex.split(run)) if isinstance(run, str) else tuple(map(str, run))
    return Attack(id=name, **lists, **rest)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
