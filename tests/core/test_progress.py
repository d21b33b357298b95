"""Progress: a bar on a terminal, plain lines in a file, also of the libraries' own bars."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from transformers import TrainerState

from ema_scale.core.progress import Progress
from ema_scale.training.metrics import BarProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_lines_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with Progress("reading", 0, unit="row") as progress:
        monkeypatch.setattr("ema_scale.core.progress.SECONDS_BETWEEN_LINES", 0.0)
        progress.at(2, 5)
        assert "reading: 2 of 5 (" in caplog.text
        progress.add(3)
    assert capsys.readouterr().err == "" and caplog.text.splitlines()[-1].count("reading: 5 of 5 (") == 1
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("writing", 5) as progress:
        progress.add(5)
    assert "writing:   0%|" in terminal.getvalue() and caplog.text.count("writing: 5 of 5 (") == 1
    with Progress("hidden", 5, shown=False) as progress:
        progress.add(5)
    assert "hidden" not in terminal.getvalue() + caplog.text


def test_no_library_draws_a_bar_into_a_file() -> None:
    """The command sets what libraries read when they are imported."""
    code = """
import sys
from ema_scale.cli import main
sys.argv = ["ema", "--version"]
try:
    main()
except SystemExit:
    pass
from tqdm import tqdm
from tqdm.auto import tqdm as auto
print(len(list(tqdm(range(3)))), len(list(auto(range(3)))))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.stdout.endswith("3 3\n") and done.stderr == ""


def test_training_on_a_terminal_is_one_bar_that_ends_in_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    bar, state = BarProgress(["kl"]), TrainerState(max_steps=10, global_step=5, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 0.5, "kl": 0.25, "drift/layer_1": 0.1, "grad_norm": 1.0})
    bar.on_train_end(None, state, None)
    last = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "5/10 [" in last and "loss 0.5000 kl 0.2500]" in last and "drift" not in last
