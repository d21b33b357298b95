"""A report while a study goes on: when it is drawn, what it says, and what is left of it."""

import logging

import pytest

from ema_scale.report.make import write_partial_report
from ema_scale.report.records import PAGE
from ema_scale.study import partial_report
from ema_scale.study.partial_report import PartialReport
from tests.report.runs import ARMS, write_run


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The seconds at which pages were drawn; `drawn.now` is the clock, `drawn.takes` what a page takes."""

    class Drawn(list):
        now, takes = 0.0, 4.0

    pages = Drawn()

    def draw(runs, out, title):
        pages.append(pages.now)
        pages.now += pages.takes
        return out / PAGE

    monkeypatch.setattr("ema_scale.report.make.write_partial_report", draw)
    monkeypatch.setattr(partial_report.time, "monotonic", lambda: pages.now)
    return pages


def test_the_first_evaluated_run_is_drawn_and_others_when_it_costs_little(tmp_path, drawn, caplog):
    caplog.set_level(logging.INFO)
    partial = PartialReport([], tmp_path, "t")
    for drawn.now in (1.0, 100.0):
        partial.trained()
    assert drawn == []
    drawn.now = 120.0
    assert partial.wants()
    partial.look()
    asked = [drawn.now for drawn.now in map(float, range(125, 2000, 5)) if partial.wants() and not partial.look()]
    # 4 s more are 2 % of 400 s, and 12 s of 600 s.
    assert drawn[:3] == [120.0, 400.0, 600.0] and len(drawn) == 1 + len(asked)
    assert sum(f"what there is so far is in {tmp_path / PAGE}" in r.message for r in caplog.records) == 1


def test_training_curves_of_a_long_study_are_drawn_before_it_is_evaluated(tmp_path, drawn):
    partial = PartialReport([], tmp_path, "t")
    for drawn.now in (200.0, 250.0, 260.0):
        partial.trained()
    assert drawn == [250.0]
    assert partial.wants()  # they show no answers


def test_a_page_that_cannot_be_drawn_stops_nothing(tmp_path, caplog):
    partial = PartialReport([], tmp_path, "t")
    partial.look()
    assert "a partial report could not be drawn (report: found no run folder" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_partial_page_says_so_and_is_all_that_is_written(tmp_path):
    runs = [write_run(tmp_path / "runs", "medical", f"{name}-s0", arm, steps=9) for name, arm in list(ARMS.items())[:2]]
    (runs[1] / "eval" / "summary.json").unlink()
    out = tmp_path / "report"
    text = write_partial_report([*runs, tmp_path / "runs" / "not-begun"], out, "A study").read_text(encoding="utf-8")
    assert "Partial: 1 of 3 runs are evaluated." in text and text.count("<figure>") == 2
    assert "The criteria" in text and "not-begun" not in text
    assert [path.name for path in out.iterdir()] == [PAGE]
