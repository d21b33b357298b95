"""`ema bench safelora` on one layer of a small shape: the command really runs, and its figures are its own."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import safelora
from ema_scale.cli import app
from ema_scale.core.errors import UserError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(safelora, "MATRICES", {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)})


def test_time_and_memory_of_the_command_itself(small, tmp_path):
    out = tmp_path / "safelora.json"
    arguments = ["bench", "safelora", "--layers", "2", "--folder", str(tmp_path / "room"), "-o", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (variant,) = json.loads(out.read_text())["variants"]
    assert variant["figures"]["matrices"] == 4 and variant["seconds"][0] > 0.1 and variant["peak_bytes"] > 50e6
    assert not list((tmp_path / "room").iterdir()), "the random models are gone"


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(safelora, "MATRICES", {"mlp.up_proj": (10**7, 10**6)})
    with pytest.raises(UserError, match="GB free, the models of 1 layers need"):
        safelora.bench_safelora(1, 1, tmp_path)
    assert not list(tmp_path.iterdir())
