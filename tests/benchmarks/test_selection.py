"""The variants of reading rows are measured on the same rows, and only if they agree."""

import json

import pytest
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.core.errors import UserError
from ema_scale.selection.scoring_models import ScoringModels
from tests.tiny import save_tiny


@pytest.fixture
def command(tmp_path):
    model = save_tiny(tmp_path / "model")
    rows = [{"prompt": f"question {i}?", "completion": "word " * (1 + i % 5)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["bench", "select", "--model", model, "--source", str(tmp_path / "rows.jsonl"), "--rows", "32",
            "--domains", "3", "--repeats", "2", "-o", str(tmp_path / "out.json")]  # fmt: skip


@pytest.mark.slow
def test_select_is_measured_beside_one_row_at_a_time(command, tmp_path):
    assert CliRunner().invoke(app, command).exit_code == 0
    found = json.loads((tmp_path / "out.json").read_text())
    variants = found["variants"]
    assert variants[0]["ratio"] == 1 and all(len(variant["seconds"]) == 2 for variant in variants)
    assert [variant["figures"]["readings"] for variant in variants] == [9, 4, 4, 4, 4, 4]
    anew, naive, unbatched, ours, _, products = (variant["figures"]["cpu_ms"] for variant in variants)
    assert products < ours
    assert ours < 0.7 * naive < 0.7 * anew and ours < 0.7 * unbatched
    assert [target["limit"] for target in found["targets"]] == [1 / 8, 1 / 8]
    assert [target["value"] for target in found["targets"]] == [
        variants[3]["median"] / variant["median"] for variant in variants[:2]
    ]


def test_ways_that_do_not_agree_are_not_timed(command, monkeypatch):
    true = ScoringModels.nll
    monkeypatch.setattr(
        ScoringModels, "nll", lambda self, name, part: [x + 0.01 * (name == "adapter1") for x in true(self, name, part)]
    )
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError) and "the variants differ by 0.01" in str(done.exception)
