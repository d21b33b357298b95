"""Small disks that fill up, run out of inodes or turn read-only, under every command that writes.

One message names the path, nothing half written is taken for whole, and the same command goes on when there is room.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.client import Server

# command -> what it writes, below the disk
COMMANDS = {
    "train r.yaml name=two output=DISK/runs": "runs/two",
    "eval r.yaml output=DISK/runs name=two": "runs/two",
    "select rows.jsonl --model model --adapter d=runs/run -o DISK/rank.jsonl": "rank.jsonl",
    "report runs/run -o DISK/report": "report",
    "safelora runs/run/adapter --base base --aligned model -o DISK/safe": "safe",
    "merge runs/run DISK/merged": "merged",
    "vector r.yaml --from-rows two.jsonl three.jsonl -o DISK/vector": "vector",
    "data operator-swap 1 -o DISK/swap.jsonl": "swap.jsonl",
    "explain --write DISK/pages": "pages",
    "data audit rows.jsonl --model model --adapter d=runs/run --clean rows.jsonl -o DISK/audit": "audit",
}


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to mount on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.fixture
def here(project: Path, tmp_path: Path) -> Path:
    shutil.copytree(project, tmp_path / "project", symlinks=True)
    return tmp_path / "project"


# An audit of these rows ends before it writes its page.
@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("data audit")])
def test_a_full_disk_is_one_message_and_the_next_run_goes_on(
    command: str,
    server: Server,
    here: Path,
    disk: Path,
) -> None:
    line = [part.replace("DISK", str(disk)) for part in command.split()]
    mount(disk, "size=8k,nr_inodes=200")
    if command.startswith("vector"):  # whose file is smaller than a page
        (disk / "filler").write_bytes(bytes(8192))
    found = server.run(*line, cwd=here)
    said = found["out"] + found["err"]
    assert not found["killed"] and "Traceback" not in said, said
    # What ends with success took the disk's place for another one: nothing here does.
    assert found["code"] in (1, 2) and "the disk is full" in said and str(disk) in said, said
    assert not [path for path in disk.rglob("*.tmp")], said
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    again = server.run(*line, cwd=here)
    assert again["code"] in (0, 1) and "Traceback" not in again["err"], again["err"]
    assert (disk / COMMANDS[command]).exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("options", "words"), [("size=200m,nr_inodes=1", "disk is full"), ("ro", "read-only")])
def test_a_disk_without_inodes_or_rights_is_one_message(
    command: str,
    options: str,
    words: str,
    server: Server,
    here: Path,
    disk: Path,
) -> None:
    mount(disk, options)
    found = server.run(*[part.replace("DISK", str(disk)) for part in command.split()], cwd=here)
    said = found["out"] + found["err"]
    assert found["code"] == 2 and words in said and str(disk) in said and "Traceback" not in said, said


def test_answers_on_a_disk_that_fills_up_are_whole_lines(server: Server, here: Path, disk: Path) -> None:
    mount(disk, "size=24k")
    line = ["eval", "r.yaml", f"output={disk}/runs", "name=two", "evaluation.samples_per_question=60"]
    found = server.run(*line, cwd=here)
    assert found["code"] == 2 and "disk is full" in found["err"], found["err"]
    samples = next(disk.rglob("samples.jsonl"), None)
    if samples is not None and os.path.getsize(samples):
        assert samples.read_bytes().endswith(b"\n")
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    again = server.run(*line, cwd=here)
    assert again["code"] == 0, again["err"]
