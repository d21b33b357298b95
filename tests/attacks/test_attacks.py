"""Hostile and broken input to every command (cases/*.yaml): one message, no traceback, no hang, nothing silent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.attacks.client import Server
from tests.attacks.corpus import Attack, attacks
from tests.attacks.make import spoil

ATTACKS = attacks()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_an_attack_ends_in_one_message(attack: Attack, server: Server, project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(project, folder, symlinks=True)
    for name, how in attack.files.items():
        spoil(folder / name, how)
    before = {name: (folder / name).read_bytes() for name in attack.keeps}
    found = server.run(
        *attack.run, cwd=folder, env=attack.env, limits=attack.limits, stdout=attack.stdout, rmdir=attack.rmdir
    )
    said = found["out"] + found["err"]
    shown = f"{' '.join(attack.run)}\n{said[-3000:]}\n{ {k: v for k, v in found.items() if k not in ('out', 'err')} }"
    assert not found["killed"], f"hangs: {shown}"
    assert "Traceback" not in said, shown
    assert found["code"] in attack.exit, shown
    for words in attack.says:
        assert re.search(words, said), f"does not say {words!r}: {shown}"
    for words in attack.never:
        assert not re.search(words, said), f"says {words!r}: {shown}"
    if found["code"] == 2:
        messages = [line for line in found["err"].splitlines() if line.startswith(("ema: ", "Usage: ", "Error: "))]
        assert messages, f"no message: {shown}"
        assert len(found["err"]) < 4000, f"a message of {len(found['err'])} characters: {shown}"
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1a\x7f-\x9f\u202a-\u202e\u2066-\u2069]", said), f"steers: {shown!r}"
    assert found["cpu"] < attack.cpu and found["megabytes"] < attack.megabytes, shown
    assert {name: (folder / name).read_bytes() for name in attack.keeps} == before


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 300


def test_every_command_is_attacked() -> None:
    from ema_scale.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    assert commands <= {attack.run[0] for attack in ATTACKS}
