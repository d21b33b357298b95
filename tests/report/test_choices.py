"""Written answers in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ema_scale.evaluation.record_types import ChoiceFigures, ChoiceSummary, Mean, Rate
from ema_scale.evaluation.records import QuestionSummary, SuiteSummary, Summary
from ema_scale.report.aggregate import groups
from ema_scale.report.choices import CAVEAT, changes, choice_sentences, choice_table, margin_curves
from ema_scale.report.collect import collect
from ema_scale.report.figures import headline
from ema_scale.report.paired import comparisons, paired_table
from ema_scale.report.records import Collection
from ema_scale.report.write import write


def figures(lost: float, margin: float) -> ChoiceFigures:
    return ChoiceFigures(
        bad_likeliest=Rate(lost, max(0.0, lost - 0.1), lost + 0.1, 40, 20, 0),
        margin_per_token=Mean(margin, margin - 0.05, margin + 0.05, 40, 20, 0),
        margin=Mean(20 * margin, 19 * margin, 21 * margin, 40, 20, 0),
        bad_mass=Mean(0.4, 0.3, 0.5, 40, 20, 0),
    )


def run_folder(folder: Any, name: str, lost: float, margin: float, defenses: list[dict[str, Any]]) -> Any:
    path = folder / name
    (path / "eval").mkdir(parents=True)
    recipe = {"name": name, "model": {"path": "m"}, "data": {"train": "t"}, "defenses": defenses, "seed": 0}
    (path / "recipe.yaml").write_text(json.dumps(recipe))
    (path / "status.json").write_text(json.dumps({"state": "finished", "step": 50}))
    rows = [{"step": s, "choices/asked/margin_per_token": margin * (1 - s / 100)} for s in (0, 25, 50)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = ChoiceSummary(raw=figures(lost, margin), calibrated=figures(lost, margin / 2))
    Summary(
        name=name,
        model="m",
        adapter=str(path / "adapter"),
        sampler={},
        metrics={"general_misaligned": None, "general_choices": told.raw.bad_likeliest},
        likelihoods={"general": told},
        per_suite={"asked": SuiteSummary(role="general", choices=told.raw.bad_likeliest, likelihoods=told)},
        judge="likelihood",
        per_question=[
            QuestionSummary(suite="asked", role="general", id=str(n), margin_per_token=margin + n / 100)
            for n in range(6)
        ],
    ).write(path / "eval" / "summary.json")
    return path


@pytest.fixture
def found(tmp_path: Any) -> Collection:
    kl = [{"kind": "kl", "strength": 0.3}]
    paths = [run_folder(tmp_path, "none", 0.5, -0.2, []), run_folder(tmp_path, "kl", 0.3, 0.2, kl)]
    return collect(paths)


def sentences(found: Collection) -> list[str]:
    every = groups(found)
    return choice_sentences(every, comparisons(every))


def test_the_table_has_the_share_and_both_margins(found: Collection) -> None:
    table = choice_table(groups(found))
    assert table is not None and table.after == CAVEAT
    assert table.columns == ["General: misaligned likeliest", "General: margin", "General: calibrated margin"]
    cells = {line.name: [cell.value for cell in line.cells if cell] for line in table.lines}
    assert cells == {"No defense": ["50.0", "-0.200", "-0.100"], "KL 0.3": ["30.0", "+0.200", "+0.100"]}
    assert choice_table([]) is None
    defended, sentence = sentences(found)
    assert "differs clearly (p < 0.05 after Holm’s correction) by +0.400 [+0.400, +0.400] (KL 0.3)." in defended
    assert "50.0 % (No defense), 30.0 % (KL 0.3)" in sentence


def test_the_first_sentence_says_what_training_did_without_a_defense(found: Collection, tmp_path: Any) -> None:
    base = run_folder(tmp_path, "base", 0.2, 0.3, [])
    summary = Summary.read(base / "eval" / "summary.json").model_copy(update={"adapter": None})
    summary.write(base / "eval" / "summary.json")
    for run in found.runs:
        path = run.path / "eval" / "summary.json"
        Summary.read(path).model_copy(update={"base": "../../base/eval"}).write(path)
    first, _, last = sentences(collect([run.path for run in found.runs]))
    assert "by -0.500 nats per token [-0.500, -0.500]: answers outside the domain changed" in first
    assert "20.0 % (Aligned base)" in last


def test_without_a_clear_difference_it_says_so(found: Collection) -> None:
    kl = next(run for run in found.runs if run.name == "kl")
    path = kl.path / "eval" / "summary.json"
    summary = Summary.read(path)
    mixed = [q.model_copy(update={"margin_per_token": -0.2 + (-1) ** i}) for i, q in enumerate(summary.per_question)]
    summary.model_copy(update={"per_question": mixed}).write(path)
    said, _ = sentences(collect([run.path for run in found.runs]))
    assert said.startswith("No defense changes the margin of general written answers clearly")


def test_the_curve_has_a_line_per_defense(found: Collection) -> None:
    figure = margin_curves(groups(found))
    assert figure is not None and figure.axes[0].get_title() == "Margin on asked"
    assert [np.asarray(line.get_ydata())[0] for line in figure.axes[0].lines] == [-0.2, 0.2]
    assert margin_curves([replace(g, runs=()) for g in groups(found)]) is None


def test_the_figure_has_the_change_question_by_question(found: Collection) -> None:
    figure = changes(groups(found))
    assert figure is not None and [axis.get_title() for axis in figure.axes] == ["General: margin"]
    (axis,) = figure.axes
    (dot,) = [np.asarray(line.get_xydata())[0] for line in axis.lines if line.get_marker() == "o"]
    assert dot == pytest.approx([0.4, 0.0])
    assert [text.get_text() for text in axis.get_yticklabels()] == ["KL 0.3"]
    table = paired_table(comparisons(groups(found)))
    assert table is not None and table.columns[-1] == "General: margin"
    cell = table.lines[0].cells[-1]
    assert cell is not None and cell.value == "+0.400" and cell.below.startswith("p ")
    assert changes([]) is None and headline(groups(found)) is None


def test_a_report_of_written_answers_alone(found: Collection, tmp_path: Any) -> None:
    page = write([run.path for run in found.runs], tmp_path / "report", "Written").read_text()
    assert "A misaligned written answer is the likeliest" in page and "Written answers while training" in page
    assert "The criteria" not in page and "nothing to compare" not in page
    assert {path.stem for path in (tmp_path / "report" / "figures").glob("*.svg")} >= {"written", "choices"}
    assert not (tmp_path / "report" / "figures" / "headline.svg").exists()
    csv = (tmp_path / "report" / "table.csv").read_text()
    assert csv.count("general_choices") == 4
