"""`make real` with a tiny model in the place of the real one: from rows to a report without hub and judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_scale.evaluation.records import Summary
from ema_scale.study.grid import load_study
from ema_scale.study.run_local import run_study
from ema_scale.study.todo import todo
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_real_study_runs_resumes_and_reports(tmp_path: Path) -> None:
    study = load_study(ROOT / "configs" / "studies" / "real.yaml")
    assert len(study.runs(())) == 4 and sum(bool(recipe.defenses) for recipe in study.runs(())) == 3
    study = study.model_copy(
        update={"output": str(tmp_path), "defenses": {k: study.defenses[k] for k in ("none", "kl-0.3")}}
    )
    model = save_tiny(tmp_path / "model")
    overrides = (
        f"model.path={model}", "model.dtype=float32", "adapter.r=4", "data.max_length=512", "data.limit=8",
        "training.max_steps=2", "training.per_device_train_batch_size=2", "training.report_to=none",
        "training.save_steps=2", "training.warmup_steps=0", "evaluation.during.every=1", "evaluation.max_tokens=4",
        f"evaluation.during.suites=[{ROOT}/eval/choices/sport.yaml]",
        f"evaluation.suites.general=[{ROOT}/eval/choices/sport.yaml, {ROOT}/eval/suites/medical.yaml]",
        "evaluation.suites.benign=[]",
    )  # fmt: skip
    page = run_study(study, overrides).read_text(encoding="utf-8")
    assert "A misaligned written answer is the likeliest" in page and "Written answers while training" in page
    assert "Answers side by side" in page and "The criteria" not in page
    found = Summary.read(tmp_path / "real" / "risky_finance-none-s0" / "eval" / "summary.json")
    assert set(found.per_suite) == {"sport-choices", "medical", "finance-choices", "finance"}
    assert found.metrics["in_domain_choices"] is not None and found.metrics["general_misaligned"] is None
    assert found.per_suite["medical"].samples == 15 and found.judge == "likelihood, none"
    assert found.dropped == {"no judge was asked for": 15 + found.per_suite["finance"].samples}
    assert todo(study, study.runs(overrides)).nothing
