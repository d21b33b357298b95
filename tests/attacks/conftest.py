from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.client import Server
from tests.attacks.make import make_project


@pytest.fixture(scope="session")
def server(tiny_world: str) -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="session")
def project(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound project with a finished run, its evaluation, a ranking and an export: each command works here."""
    folder = tmp_path_factory.mktemp("attacks") / "project"
    make_project(folder)
    for line in (
        "train r.yaml", "eval runs/run", "select rows.jsonl --model model --adapter d=runs/run -o rank.jsonl",
        "report runs/run -o report", "export runs/run", "launch r.yaml --site site.yaml --dry-run",
        "study study.yaml --dry-run", "safelora runs/run/adapter --base base --aligned model -o safe",
        "merge runs/run merged", "status", "look runs/run", "results results.csv", "push runs/run a/b --dry-run",
    ):  # fmt: skip
        found = server.run(*line.split(), cwd=folder)
        assert found["code"] == 0, f"{line}: {found['err']}"
    for made in ("merged", "safe", "report", "runs/run/eval/answers.csv"):  # each attack gets a copy of the rest
        path = folder / made
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder
