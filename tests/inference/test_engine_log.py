"""An engine's messages go to a file, those of compiled code and of children too."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ema_scale.core.errors import UserError
from ema_scale.inference.engine_log import logger_to, output_to


def test_prints_of_every_kind_go_to_the_file_and_no_further(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "eval" / "engine.log"
    print("before")
    with output_to(path):
        os.write(1, b"python\n")
        os.write(2, b"compiled\n")
        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    print("after")
    assert set(path.read_text().split()) == {"python", "compiled", "child"}
    assert capfd.readouterr().out.split() == ["before", "after"]
    with output_to(path):
        os.write(1, b"appended\n")
    assert path.read_text().endswith("appended\n")


def test_an_error_passes_and_output_is_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), output_to(tmp_path / "log"):
        raise ValueError
    print("seen")
    assert "seen" in capfd.readouterr().out


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder is in its place, expected a file"), output_to(tmp_path):
        pass


def test_a_logger_writes_to_the_file_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("some.engine.part")
    with logger_to("some.engine", tmp_path / "log"):
        logger.warning("inside")
    logger.warning("outside")
    assert "inside" in (tmp_path / "log").read_text() and caplog.messages == ["outside"]
