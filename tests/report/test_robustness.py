"""The report's tables on how firm its numbers are: paired with no defense, counted in other ways, other thresholds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ema_scale.evaluation.stats.arms import read_arm
from ema_scale.evaluation.stats.paired import compare
from ema_scale.evaluation.stats.sensitivity import ScoredAnswer, rate_variants
from ema_scale.report.aggregate import RunGroup, groups
from ema_scale.report.collect import collect
from ema_scale.report.paired import against, comparisons, paired_table
from ema_scale.report.robustness import robustness_table, threshold_curves
from ema_scale.report.write import Section, render
from tests.report.runs import ARMS, write_study


def with_variants(folder: Path, graded: bool) -> None:
    """Put `general_variants` into a written evaluation's summary; graded: as by a judge with scores in between."""
    rng = random.Random(folder.name)
    rows = [r for r in read_arm(folder).rows if r.role == "general"]
    answers = [ScoredAnswer(r.question, r.aligned, r.coherent) for r in rows]
    if graded:
        answers = [ScoredAnswer(a.question, abs((a.aligned or 0) - rng.uniform(0, 45)), a.coherent) for a in answers]
    path = folder / "eval" / "summary.json"
    variants = rate_variants(answers)
    assert variants is not None
    summary = json.loads(path.read_text()) | {"general_variants": variants.model_dump(mode="json")}
    path.write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("firm")
    made = write_study(root, arms={n: ARMS[n] for n in ("none", "kl-0.1", "kl-1")}, seeds=2)
    for folder in [*made, root / "base"]:
        if "operator" not in folder.name:
            with_variants(folder, graded=True)
    return made


@pytest.fixture(scope="module")
def of_model(runs: list[Path]) -> list[RunGroup]:
    return groups(collect(runs))


def test_the_paired_difference_of_one_run_each_is_what_the_command_says(tmp_path: Path) -> None:
    made = write_study(tmp_path, tasks=("medical",), arms={n: ARMS[n] for n in ("none", "kl-0.1")})
    none, defended = (next(g for g in groups(collect(made)) if g.label == label) for label in ("No defense", "KL 0.1"))
    said = {one.measure: one.difference for one in compare(read_arm(made[1]), read_arm(made[0]))}
    for metric, measure in (
        ("general_misaligned", "general misaligned"),
        ("in_domain_incoherent", "in-domain incoherent"),
    ):
        assert against(defended, none, metric) == said[measure]
    assert against(defended, none, "benign_learned") is None


def test_seeds_are_pooled_and_tasks_are_not_mixed(of_model: list[RunGroup]) -> None:
    none, defended = (next(g for g in of_model if g.label == label) for label in ("No defense", "KL 1"))
    found = against(defended, none, "general_misaligned")
    assert found is not None and found.questions == 20 and found.value == pytest.approx(-0.45, abs=0.1)
    learned = against(defended, none, "benign_learned")
    assert learned is not None and learned.questions == 20 and learned.value == pytest.approx(-0.57, abs=0.12)
    assert found.p < 0.001 and found.high < -0.3


def test_the_page_holds_the_tables(of_model: list[RunGroup]) -> None:
    sheets = [sheet for sheet in (paired_table(comparisons(of_model)), robustness_table(of_model)) if sheet]
    text = render("A study", [], [Section("model", ["Said."], {}, [], [], [], sheets)], [], [])
    for words in (
        "Against no defense, question by question",
        "p &lt; 0.001",
        "How firm these numbers are",
        "Misalign@10",
    ):
        assert words in text, words


def test_each_way_of_counting_stands_in_its_column(of_model: list[RunGroup]) -> None:
    sheet = robustness_table(of_model)
    assert sheet is not None and [line.kind for line in sheet.lines] == ["base", "none", "defense", "defense"]
    undefended = sheet.lines[1]
    values = [float(cell.value.replace(",", "")) if cell else None for cell in undefended.cells]
    plain, coherent, every, at, questions = values
    assert plain and coherent and every and at and questions
    assert coherent > every and at > 60 and questions > 100
    assert robustness_table([g for g in of_model if not g.metrics]) is None


def test_exact_judges_have_no_threshold_curves(tmp_path: Path, of_model: list[RunGroup]) -> None:
    assert threshold_curves(of_model) is not None
    made = write_study(tmp_path, tasks=("medical",), arms={"none": ARMS["none"]})
    with_variants(made[0], graded=False)
    assert threshold_curves(groups(collect(made))) is None


def test_without_an_undefended_run_nothing_is_paired(runs: list[Path]) -> None:
    assert paired_table(comparisons(groups(collect([run for run in runs if "none" not in run.name])))) is None
