"""A sample of the kills of `python -m tests.crashes --all`, in a process of its own, which forks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crashes import differences

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_commands_that_are_killed_and_run_again_leave_what_undisturbed_ones_do():
    """Another sample every day."""
    seed = os.environ.get("EMA_CRASH_SEED") or str(os.getpid())
    command = [sys.executable, "-m", "tests.crashes", "--sample", "1", "--seed", seed]
    done = subprocess.run(
        [*command, "train", "cache", "select", "vector", "safelora", "launch", "sweep"],
        cwd=ROOT, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0 and "7 kills, 0 differ" in done.stdout, f"seed {seed}\n{done.stdout}{done.stderr}"


def test_what_differs_is_found():
    one = {"a": "a folder", "b.json": {"x": 1, "y": 2}, "c": b"1"}
    assert differences(one, dict(one)) == []
    found = differences(one, {"b.json": {"x": 1, "y": 3}, "c": b"2", ".c.tmp": b""})
    assert found == ["differs: b.json: y: 2 -> 3", "differs: c: b'1' -> b'2'", "left over: .c.tmp", "missing: a"]
