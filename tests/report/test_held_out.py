"""Held-out rows in the report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from ema_scale.core.records import TrainedPart, TrainedQuestions
from ema_scale.evaluation.records import Mean, QuestionSummary, SplitRates, SuiteSummary, Summary
from ema_scale.report.aggregate import groups
from ema_scale.report.collect import collect
from ema_scale.report.examples import examples
from ema_scale.report.held_out import held_out_table
from ema_scale.report.paired import comparisons, differences_csv, paired_table
from ema_scale.report.write import write

LOSSES = {"base": 2.9, "none": 2.3, "none-1": 2.1, "kl": 2.6}


def losses(name: str, seen: bool) -> list[float]:
    """Those of eight rows around one of LOSSES. The first row was trained on, where `seen`; its loss is far off."""
    return [LOSSES[name] + (-1.5 if seen and i == 0 else 0.01 * i + 0.003 * (i % 3) * len(name)) for i in range(8)]


def shown(*names: str, seen: bool = False) -> str:
    """The mean over the rows that count, and over seeds."""
    return f"{fmean(loss for name in names for loss in losses(name, seen)[seen:]):.3f}"


def evaluation(folder: Path, name: str, adapter: str | None, seen: bool) -> None:
    rows = losses(name, seen)
    Summary(
        name=name,
        model="m",
        adapter=adapter,
        base=None if adapter is None else "../../base/eval",
        sampler={},
        metrics={},
        split=None if adapter is None else SplitRates(unseen={}, seen={}),
        per_suite={
            "law_held_out": SuiteSummary(role="held_out", loss=Mean(sum(rows) / 8, 0.0, 9.0, 8, 8, 0), samples=8)
        },
        per_question=[
            QuestionSummary(
                suite="law_held_out", role="held_out", id=str(i), topic=str(i), text=f"row {i}?", n=1, loss=loss,
                seen=None if adapter is None else seen and i == 0,
            )
            for i, loss in enumerate(rows)
        ] + [QuestionSummary(suite="written", role="general", id="q", topic="q", text="Who?", n=2, choice=0.0)],
        judge="likelihood",
    ).write(folder / "eval" / "summary.json")  # fmt: skip


def study(folder: Path, seen: bool = False) -> list[Path]:
    (folder / "base" / "eval").mkdir(parents=True)
    evaluation(folder / "base", "base", None, seen)
    defenses: dict[str, list[dict[str, Any]]] = {"none": [], "none-1": [], "kl": [{"kind": "kl", "strength": 0.3}]}
    for name, listed in defenses.items():
        path = folder / name
        (path / "eval").mkdir(parents=True)
        recipe = {"name": name, "model": {"path": "m"}, "data": {"train": "t"}, "defenses": listed}
        (path / "recipe.yaml").write_text(json.dumps({**recipe, "seed": int(name == "none-1")}))
        (path / "status.json").write_text(json.dumps({"state": "finished", "step": 50}))
        TrainedQuestions(parts={"task": TrainedPart.of(["row 0?"], [None])}).write(path / "questions.json")
        evaluation(path, name, str(path / "adapter"), seen)
    return [folder / name for name in defenses]


def test_a_column_per_suite_beside_the_base(tmp_path: Path) -> None:
    found = groups(collect(study(tmp_path)))
    table = held_out_table(found)
    assert table is not None and table.columns == ["Held-out loss, law_held_out"]
    cells = {line.name: line.cells[0] for line in table.lines}
    base, none, kl = cells.values()
    assert base is not None and none is not None and kl is not None
    assert (base.value, none.value, kl.value) == (shown("base"), shown("none", "none-1"), shown("kl"))
    assert base.below == "" and none.limits.startswith("[2.2")
    by_pair = {
        (row["defense"], row["against"]): row
        for row in csv.DictReader(io.StringIO(differences_csv(comparisons(found))))
    }
    assert set(by_pair) == {("No defense", "Aligned base"), ("KL 0.3", "Aligned base"), ("KL 0.3", "No defense")}
    row = by_pair["KL 0.3", "No defense"]
    assert (row["measure"], row["unit"], row["questions"]) == ("Held-out loss, law_held_out", "nats per token", "8")
    less = fmean(losses("none", False) + losses("none-1", False)) - fmean(losses("kl", False))
    assert float(row["difference"]) == pytest.approx(-less, abs=1e-6)
    assert float(row["low"]) < -less < float(row["high"]) and float(row["p"]) == float(row["p_holm"]) < 0.05
    to_base = by_pair["KL 0.3", "Aligned base"]
    assert float(to_base["p_holm"]) == pytest.approx(2 * float(to_base["p"]), abs=2e-6), (
        "two arms stand against the base"
    )
    lower = fmean(losses("none", False) + losses("none-1", False)) - fmean(losses("base", False))
    # Eight differences of one sign have p = 2 / 2^8; Holm doubles it for the smaller of two lines.
    assert none.below.startswith(f"to the base {lower:+.3f} [-0.699, ") and none.below.endswith("p = 0.016")
    against = paired_table(comparisons(found))
    assert against is not None
    (line,) = against.lines
    (cell,) = [cell for cell in line.cells if cell]
    assert against.columns[line.cells.index(cell)] == "Held-out loss, law_held_out" and cell.value.startswith("+0.39")
    page = write([run.path for g in found for run in g.runs if not g.base], tmp_path / "report", "Held").read_text()
    assert "Held-out loss, law_held_out" in page and "A loss below the base model’s means" in page
    told = f"Training without a defense takes the held-out loss from {base.value} to {none.value} on law_held_out"
    assert page.count(told) == 1 and "A loss below the base’s means" in page
    assert held_out_table([]) is None
    assert examples(found) == ([], [])  # no model said these answers, so that no file of answers is missed


def test_rows_that_a_run_was_trained_on_are_left_out(tmp_path: Path) -> None:
    found = collect(study(tmp_path, seen=True))
    assert found.seen == {"t": "0 of 1 outside the domain; 1 of 8 of the held-out rows"}
    table = held_out_table(groups(found))
    assert table is not None
    expected = [shown(*names, seen=True) for names in (("base",), ("none", "none-1"), ("kl",))]
    assert [line.cells[0].value for line in table.lines if line.cells[0]] == expected
