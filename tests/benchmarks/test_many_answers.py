"""The folders that `ema bench answers` measures are what an evaluation leaves."""

from pathlib import Path

from benchmarks import many_answers
from ema_scale.evaluation.records import Summary


def test_the_folders_are_whole_evaluations(tmp_path: Path) -> None:
    for name, shift in (("one", 0), ("other", 3)):
        many_answers.write_folder(tmp_path / name, name, 4, 6, shift)
        many_answers.judged(tmp_path / name)
    for way in (many_answers.before, many_answers.opened, many_answers.compared, many_answers.exported):
        way(tmp_path / "one")
    summary = Summary.read(tmp_path / "one" / "summary.json")
    assert summary.samples == 24 and summary.dropped == {}
    assert len((tmp_path / "one" / "answers.csv").read_text().splitlines()) == 25
