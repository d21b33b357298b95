"""The study that `ema bench runs` plans is one, and both of its tests give one p value."""

from pathlib import Path

import pytest

from benchmarks.many_runs import by_scipy, planned, the_counts, write_study
from ema_scale.core.errors import UserError
from ema_scale.evaluation.stats.difference import swap_p
from ema_scale.study.grid import load_study


def test_the_study_has_as_many_runs_as_asked(tmp_path: Path) -> None:
    study = write_study(tmp_path, 101)
    assert len(load_study(study).runs()) == 200, "whole multiples of 10 tasks x 10 seeds"
    seconds, peak = planned(study, None)
    assert seconds > 0 and peak > 20 * 2**20
    assert not (tmp_path / "runs").exists()


def test_a_version_that_cannot_plan_it_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ema_scale").mkdir()
    (tmp_path / "ema_scale" / "__init__.py").touch()
    (tmp_path / "ema_scale" / "cli.py").write_text("def main():\n    raise SystemExit('no such command')\n")
    with pytest.raises(UserError, match="no such command"):
        planned(write_study(tmp_path, 1), tmp_path)


def test_both_permutation_tests_agree() -> None:
    counts = the_counts(40)
    assert swap_p(counts) == pytest.approx(by_scipy(counts), abs=0.02)
