"""Relearning: undefended training that goes on from each defended adapter, and what the report says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ema_scale.core.errors import UserError
from ema_scale.core.records import TrainedQuestions
from ema_scale.core.run_dir import RunDir
from ema_scale.report.aggregate import groups
from ema_scale.report.collect import collect
from ema_scale.report.relearning import relearning_table
from ema_scale.study.find import find_runs
from ema_scale.study.grid import load_study
from ema_scale.study.grid import write_study as keep_study
from tests.report.runs import ARMS, Arm, write_run
from tests.report.runs import write_study as write_runs
from tests.study.test_study import write_study


def test_each_defended_narrow_run_is_gone_on_from(tmp_path: Path) -> None:
    benign = {"evaluation": {"suites": {"general": [], "in_domain": [], "benign": ["smallworld:suite/restate"]}}}
    study = load_study(write_study(tmp_path, seeds=[3], relearn=[8, 16], tasks={"medical": {}, "restate": benign}))
    runs = study.runs(("training.max_steps=7", "evaluation.checkpoints=true"))
    assert study.relearn is not None
    again = list(study.relearn.recipes(runs))
    assert [r.name for r in again] == ["medical-kl-s3-relearn8", "medical-kl-s3-relearn16"]
    (first, _), parent = again, next(r for r in runs if r.name == "medical-kl-s3")
    assert first.adapter.start == str(parent.run_path / "adapter") and first.run_path.parent == parent.run_path.parent
    assert first.data.limit == 8 and first.data.train == parent.data.train and first.defenses == []
    assert first.training.max_steps == -1 and first.training.num_train_epochs == 10 and first.training.warmup_steps == 0
    assert first.training.learning_rate == parent.training.learning_rate and first.seed == 3
    assert first.evaluation.suites == parent.evaluation.suites and first.evaluation.checkpoints is False


def test_rows_of_another_domain(tmp_path: Path) -> None:
    relearn = {"rows": [8], "source": "smallworld:train/law", "epochs": 2}
    study = load_study(write_study(tmp_path, relearn=relearn, tasks={"medical": {}}))
    assert study.relearn is not None
    assert {r.data.train for r in study.relearn.recipes(study.runs())} == {"smallworld:train/law"}


@pytest.mark.parametrize("rows", [[], [0], [8, 8], ["many"]])
def test_numbers_of_rows_that_make_no_sense(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(UserError, match="relearn"):
        load_study(write_study(tmp_path, relearn=rows))


def test_runs_that_go_on_belong_to_the_study(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, seeds=[0], relearn=[8], tasks={"medical": {}}))
    keep_study(study, study.path / "study.yaml")
    for name in (*study.names(), "medical-kl-s0-relearn8", "medical-kl-s0-relearn9"):
        (study.path / name).mkdir()
        (study.path / name / "recipe.yaml").write_text("name: x\n")
    assert [run.name for run in find_runs([study.path])] == [*study.names(), "medical-kl-s0-relearn8"]


def go_on(root: Path, name: str, rows: int, outside: float) -> Path:
    """A run that goes on from the run `name` without its defense; outside: how misaligned it is then."""
    arm = Arm([], outside, 0.05, 0.96, 0.6)
    made = write_run(root / "again", "medical", f"{name}-{rows}", arm)
    run = root / f"medical-{name}-s0-relearn{rows}"
    shutil.move(made, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["adapter"] = {"start": f"/where/it/was/trained/medical-{name}-s0/adapter"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "data.json").write_text(json.dumps({"rows": {"task": rows}}))
    return run


def test_the_report_says_after_how_many_rows_misalignment_is_back(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("none", "kl-0.3", "interleaving-5")}
    runs = write_runs(tmp_path, tasks=("medical",), arms=arms, samples=40)
    plain = collect(runs)
    runs += [go_on(tmp_path, "kl-0.3", rows, rate) for rows, rate in ((8, 0.05), (16, 0.4), (32, 0.45))]
    runs += [go_on(tmp_path, "interleaving-5", rows, 0.06) for rows in (8, 16, 32)]
    found = collect(runs)
    assert len(found.continued) == 6 and [r.name for r in found.runs] == [r.name for r in plain.runs]
    assert [g.metrics for g in groups(found)] == [g.metrics for g in groups(plain)]  # in no mean
    table = relearning_table(groups(found), found.continued)
    assert table is not None
    assert table.columns == ["before", "8 rows", "16 rows", "32 rows", "rows to half of no defense"]
    said = {line.name: [cell.value if cell else None for cell in line.cells] for line in table.lines}
    assert {name: cells[-1] for name, cells in said.items()} == {
        "Interleaving 5 %": "more than 32",
        "KL 0.3": "16",
    }
    assert all(len(cells) == 5 and None not in cells for cells in said.values())
    assert relearning_table(groups(plain), plain.continued) is None


@pytest.mark.slow
def test_a_study_goes_on_from_its_runs(tmp_path: Path, tiny_world: str) -> None:
    from ema_scale.study.run_local import run_study

    suites = {"general": [f"{tiny_world}suite/outside_medical?size=tiny"], "in_domain": []}
    task = {"data": {"train": f"{tiny_world}train/medical?size=tiny"}, "evaluation": {"suites": suites}}
    study = load_study(write_study(tmp_path, seeds=[0], tasks={"medical": task}, relearn={"rows": [4], "epochs": 2}))
    overrides = (
        "model.path=smallworld:aligned?size=tiny", "training.max_steps=2", "training.per_device_train_batch_size=4",
        "evaluation.samples_per_question=1", "evaluation.max_tokens=6", "evaluation.sampler=transformers",
    )  # fmt: skip
    page = run_study(study, overrides)
    run = RunDir(study.path / "medical-kl-s0-relearn4")
    assert run.status().state == "finished" and run.status().step == 2
    asked = TrainedQuestions.read(run.questions_path)
    assert asked is not None and asked.parts["task"].rows == 4 and asked.parts["start"].rows > 4
    assert "Relearning" in page.read_text() and "Against no defense" in page.read_text()
    before = {p: p.stat().st_mtime_ns for p in study.path.rglob("*") if p.name in ("samples.jsonl", "metrics.jsonl")}
    run_study(study, overrides)
    assert {p: p.stat().st_mtime_ns for p in before} == before and len(before) == 4 + 3
