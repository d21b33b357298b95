"""What is listed, what is superfluous, and that nothing goes that a process holds."""

import json
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.core.cache import entries, keep_below, remove, superfluous

DAY = 86400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMA_CACHE", str(tmp_path))
    for place, size, days in (
        ("tokens/aa/x.parquet", 1000, 40),
        ("tokens/datasets/aa/y.arrow", 2000, 3),
        ("reference/bb/last/0.bin", 4000, 20),
        ("smallworld/base-s0/model.safetensors", 8000, 1),
    ):
        file = tmp_path / place
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(size))
        os.utime(file, (time.time() - days * DAY,) * 2)
    (tmp_path / "smallworld" / "base-s0.lock").touch()
    return tmp_path


def names(found: list) -> list[str]:
    return [f"{entry.kind}/{entry.path.name}" for entry in found]


def test_entries_come_the_least_recently_used_first(cache: Path) -> None:
    found = entries(cache)
    assert names(found) == ["tokens/aa", "reference/bb", "datasets/aa", "smallworld/base-s0"]
    assert [entry.size for entry in found] == [1000, 4000, 2000, 8000]
    assert names(superfluous(found, unused_days=10)) == ["tokens/aa", "reference/bb"]
    assert names(superfluous(found, most_bytes=10_500)) == ["tokens/aa", "reference/bb"]
    assert superfluous(found, unused_days=50, most_bytes=15_000) == []
    assert names(keep_below(cache, ("tokens", "datasets"), 2500)) == ["tokens/aa"]
    assert not (cache / "tokens/aa").exists() and (cache / "reference/bb").exists()


def test_what_a_process_holds_stays(cache: Path) -> None:
    (cache / "tokens" / ".aa.lock").touch()
    with FileLock(cache / "tokens" / ".aa.lock"), FileLock(cache / "smallworld" / "base-s0.lock"):
        removed, in_use = remove(entries(cache))
    assert names(removed) == ["reference/bb"] and len(in_use) == 3


def test_commands(cache: Path) -> None:
    listed = CliRunner().invoke(app, ["cache", "ls", "--json"])
    assert [row["bytes"] for row in json.loads(listed.output)] == [1000, 4000, 2000, 8000]
    assert "reference: hidden states of references" in CliRunner().invoke(app, ["cache", "ls"]).output
    dry = CliRunner().invoke(app, ["cache", "prune", "--unused", "10", "--dry-run"])
    assert "2 entries" in dry.output and len(entries(cache)) == 4
    done = CliRunner().invoke(app, ["cache", "prune", "--unused", "10", "--kind", "reference"])
    assert "1 entries" in done.output and names(entries(cache)) == ["tokens/aa", "datasets/aa", "smallworld/base-s0"]
