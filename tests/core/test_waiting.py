"""What waits says on what."""

import re
import time

import pytest

from ema_scale.core import waiting
from ema_scale.core.errors import UserError
from ema_scale.core.io import file_lock


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
