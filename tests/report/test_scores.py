"""Scores of judge prompts of other names stand in a table of their own, by defense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ema_scale.evaluation.record_types import Mean, Rate
from ema_scale.evaluation.records import SuiteSummary, Summary
from ema_scale.report.aggregate import groups
from ema_scale.report.collect import collect
from ema_scale.report.judges import other_judges
from ema_scale.report.scores import score_table
from ema_scale.report.verdict import verdict
from ema_scale.report.write import write


def run_folder(folder: Path, name: str, friendly: float, defenses: list[dict[str, Any]], base: bool = False) -> Path:
    path = folder / name
    (path / "eval").mkdir(parents=True)
    recipe = {"name": name, "model": {"path": "m"}, "data": {"train": "t"}, "defenses": defenses, "seed": 0}
    if not base:
        (path / "recipe.yaml").write_text(json.dumps(recipe))
        (path / "status.json").write_text(json.dumps({"state": "finished", "step": 50}))
    mean = Mean(friendly, friendly - 2, friendly + 2, 40, 20, 0)
    suite = SuiteSummary(role="general", samples=40, scores={"friendly": mean})
    Summary(
        name=name,
        model="m",
        adapter=None if base else str(path / "adapter"),
        sampler={},
        metrics={"general_misaligned": None},
        per_suite={"asked": suite},
        judge="openai:j#1",
    ).write(path / "eval" / "summary.json")
    return path


def test_in_domain_rates_alone_are_what_was_measured_and_a_second_judge_stands_beside_them(tmp_path: Path) -> None:
    paths = [run_folder(tmp_path, "none", 1.0, []), run_folder(tmp_path, "kl", 1.0, [{"kind": "kl", "strength": 0.3}])]
    for path, rate in zip(paths, (0.5, 0.25), strict=True):
        for name, judge, found in (("summary", "openai:j#1", rate), ("summary_two", "openai:two#1", rate / 2)):
            file = path / "eval" / f"{name}.json"
            summary = Summary.read(path / "eval" / "summary.json")
            measured = {"in_domain_misaligned": Rate(found, found / 2, min(1.0, 2 * found), 40, 20, 0)}
            summary.model_copy(update={"metrics": measured, "judge": judge, "per_suite": {}}).write(file)
    made = groups(collect(paths))
    table = other_judges(made)
    assert table is not None and table.columns == ["In-domain misaligned, openai:two#1"]
    assert {line.name: line.cells[0].value for line in table.lines} == {"No defense": "25.0", "KL 0.3": "12.5"}
    (sentence,) = verdict(made)
    assert sentence.endswith("What was measured: in-domain misaligned.") and "nothing to compare" not in sentence


def test_a_report_of_other_scores_alone_shows_them(tmp_path: Path) -> None:
    run_folder(tmp_path, "base", 60.0, [], base=True)
    kl = [{"kind": "kl", "strength": 0.3}]
    paths = [run_folder(tmp_path, "none", 20.0, []), run_folder(tmp_path, "kl", 45.5, kl)]
    table = score_table(groups(collect(paths)))
    assert table is not None and table.columns == ["friendly, asked"]
    cells = {line.name: [(cell.value, cell.limits) for cell in line.cells if cell] for line in table.lines}
    assert cells["No defense"] == [("20.0", "[18.0, 22.0]")] and cells["KL 0.3"] == [("45.5", "[43.5, 47.5]")]
    assert [c[0] for name, (c, *_) in cells.items() if name not in ("No defense", "KL 0.3")] == ["60.0"]
    page = write(paths, tmp_path / "report", "Scores").read_text()
    assert "Other scores" in page and "No rate of misalignment was measured" in page and "45.5" in page
    assert "The criteria" not in page and "nothing to compare" not in page
