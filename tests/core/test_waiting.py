"""What waits says on what."""

import os
import re
import time

import pytest

from ema_scale.core import waiting
from ema_scale.core.errors import UserError
from ema_scale.core.io import file_lock
from ema_scale.inference.engine_log import output_to


@pytest.fixture
def quick(monkeypatch, caplog):
    """After 0.1 s in place of ten."""
    monkeypatch.setattr(waiting, "FIRST_WORD", 0.1)
    caplog.set_level("INFO")
    return caplog


def test_a_wait_says_on_what_and_says_it_less_and_less_often(quick):
    with waiting.waiting("the kettle"):
        time.sleep(0.95)
    assert len(quick.messages) == 4 and set(quick.messages) <= {f"waiting for the kettle ({n} s)" for n in "01"}
    quick.clear()
    with waiting.waiting("nothing"):
        pass
    time.sleep(0.2)
    assert not quick.messages


def test_a_lock_that_another_process_holds_is_named_while_it_is_waited_for(tmp_path, quick):
    busy = UserError("still busy")
    with file_lock(tmp_path / "lock", busy), pytest.raises(UserError, match="still busy"):
        with file_lock(tmp_path / "lock", busy, 0.3):
            pass
    assert re.fullmatch(r"waiting for another process to release .*lock \(0 s\)", quick.messages[0])


def test_an_engines_start_is_announced_to_the_user_and_not_to_its_log(tmp_path, quick, capfd):
    with output_to(tmp_path / "engine.log") as say, waiting.waiting("the engine", say):
        os.write(2, b"its own words\n")
        time.sleep(0.15)
    assert capfd.readouterr().err == "waiting for the engine (0 s)\n"
    assert (tmp_path / "engine.log").read_text() == "its own words\n"
