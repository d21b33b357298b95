"""A judge that cannot judge says so before anything is sampled for it, and before its job is submitted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EndpointRecipe, EvaluationRecipe, JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.assignment import missing_judge_key_on_node
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate
from tests.evaluation.endpoint import Endpoint, completion
from tests.evaluation.test_run import exact_suite, open_suite

ROOT = Path(__file__).resolve().parents[3]
BANK = str(ROOT / "eval" / "suites" / "general.yaml")
PROMPTS = str(ROOT / "eval" / "judges" / "aligned_coherent.yaml")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"model": "m", "api_key_env": "MY_KEY"}, "the environment variable MY_KEY is not set"),
        pytest.param({"kind": "vllm", "model": "./nowhere"}, "./nowhere: no such folder", marks=pytest.mark.vllm),
    ],
)
def test_nothing_is_sampled_for_a_judge_that_cannot_judge(tmp_path: Path, judge: dict[str, Any], message: str) -> None:
    with Endpoint(lambda b, n: completion("2")) as endpoint:
        settings = EvaluationRecipe(
            sampler="openai", endpoint=EndpointRecipe(base_url=endpoint.url), judge=JudgeRecipe(**judge)
        )
        one, suites = EvalTarget("base", None, tmp_path), [exact_suite(), open_suite()]
        with pytest.raises(UserError, match=message):
            evaluate([one], "org/base", suites, settings)
        assert endpoint.requests == []
        evaluate([one], "org/base", suites[:1], settings)  # whose questions need no such judge
        assert len(endpoint.requests) == 12


def test_a_key_is_missed_where_a_judge_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(environment: dict[str, str] | None = None, suites: Any = BANK, **judge: Any) -> str | None:
        settings = EvaluationRecipe.model_validate(
            {"suites": {"general": suites}, "judge": {"model": "m", "prompts": PROMPTS, **judge}}
        )
        return missing_judge_key_on_node([settings], environment or {})

    assert missing() == "OPENAI_API_KEY" and missing(api_key_env="MY_KEY") == "MY_KEY"
    assert missing({"OPENAI_API_KEY": "k"}) is None and missing({"OPENAI_BASE_URL": "http://x"}) is None
    assert missing(base_url="http://x") is None and missing(kind="vllm") is None and missing(suites=[]) is None
    assert missing(suites="nowhere.yaml") is None  # the evaluation says that
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert missing() is None


def test_a_launch_warns_of_a_missing_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ema_scale", "launch", str(ROOT / "configs" / "recipes" / "paper.yaml"),
               "model.path=org/base", "data.train=rows.jsonl", f"output={tmp_path}", "--evaluate",
               "--dry-run"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OPENAI_API_KEY is set neither here nor in the site file's environment" in done.stderr
