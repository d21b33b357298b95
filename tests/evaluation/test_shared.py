"""Runs beside each other pay once for their base model's answers and for the check of their judge."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judging.rejudge import rejudge
from ema_scale.evaluation.shared import find_rows, folders_beside, turn
from ema_scale.study.evaluate import evaluate_run
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import Endpoint, completion

BANK = "- {id: a, paraphrases: [How are you?, Are you well?], samples_per_paraphrase: 2}\n"
LABELLED = "- {id: x, question: q, answers: [{label: aligned, text: kind}, {label: misaligned, text: cruel}]}\n"
ANSWERS, PROMPTS, CHECK = 4, 2, 2 * 2  # of a target; of the judge; labelled answers times repeats


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "bank.yaml").write_text(BANK)
    (tmp_path / "labelled.yaml").write_text(LABELLED)
    (tmp_path / "prompts.yaml").write_text("aligned: 'a {question} {answer}'\ncoherent: 'c {question} {answer}'\n")
    return tmp_path / "runs"


def make_run(runs: Path, name: str, models: TinyModels, adapter: int, url: str, **judge: Any) -> Path:
    """A trained run's folder, as far as an evaluation reads it."""
    here = runs.parent
    settings = {
        "sampler": "transformers",
        "max_tokens": 4,
        "suites": {"general": [str(here / "bank.yaml")]},
        "judge": {
            "model": "judge", "base_url": url, "prompts": str(here / "prompts.yaml"), "price_input": 1,
            "labelled": str(here / "labelled.yaml"), "api_key_env": "PATH", **judge,
        },
    }  # fmt: skip
    values = {"name": name, "output": str(runs), "data": {"train": "rows.jsonl"}, "evaluation": settings}
    shutil.copytree(models.adapters[adapter], runs / name / "adapter")
    (runs / name / "recipe.yaml").write_text(
        yaml.safe_dump({**values, "model": {"path": models.model, "dtype": "float32"}})
    )
    return runs / name


def test_a_second_run_pays_for_its_adapter_alone(
    runs: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with Endpoint(lambda body, number: completion("90", [("90", -0.01)])) as endpoint:
        first, second = (make_run(runs, name, tiny_models, i, endpoint.url) for i, name in enumerate(("one", "two")))
        found = evaluate_run(first)
        paid = PROMPTS * (2 * ANSWERS + CHECK)
        assert len(endpoint.requests) == paid and f"will take {paid} calls" in caplog.text
        assert f"{CHECK} hand-labelled answers, which check it, included" in caplog.text
        said = CliRunner().invoke(app, ["eval", str(second), "--dry-run"]).output
        taken = f"{ANSWERS} answers and {ANSWERS} judgements"
        assert f"taken    {taken} of the base model from {first}/base/eval, which asked the same" in said
        assert f"sample   {ANSWERS} of {2 * ANSWERS} answers" in said and f": {PROMPTS * ANSWERS} calls" in said
        caplog.clear()
        again = evaluate_run(second)
        assert len(endpoint.requests) == paid + PROMPTS * ANSWERS
        assert (
            f"will take {PROMPTS * ANSWERS} calls" in caplog.text
            and f"{second}/base/eval: takes {taken}" in caplog.text
        )
        assert again["base"].metrics == found["base"].metrics and again["base"].judge_usage is None
        checks = [json.loads((run / "judge_check" / "check.json").read_text())["judges"] for run in (first, second)]
        assert checks[0] == checks[1]
        # Another judge: the same answers. Other settings: other answers.
        other = make_run(runs, "three", tiny_models, 2, endpoint.url, model="another")
        evaluate_run(other)
        assert len(endpoint.requests) == 2 * paid + PROMPTS * ANSWERS
        samples = [read_jsonl(run / "base" / "eval" / "samples.jsonl") for run in (first, other)]
        assert samples[0] == samples[1]
        with Endpoint(lambda body, number: completion("10", [("10", -0.01)])) as moved:
            # A judge is known by its name: at another address it is the same one, and that is said.
            caplog.clear()
            rates = evaluate_run(make_run(runs, "four", tiny_models, 2, moved.url))["base"].metrics
            assert rates == found["base"].metrics and len(moved.requests) == PROMPTS * ANSWERS
            assert f"the judge openai:judge#{again['base'].judge[-8:]} at {moved.url} will take" in caplog.text
            assert f"were made at {endpoint.url}; the judge at {moved.url} has the same name" in caplog.text
            caplog.clear()
            rejudge(first / "eval", [f"evaluation.judge.base_url={moved.url}"])
            assert f"were made at {endpoint.url}; the judge at {moved.url} has the same name" in caplog.text
            assert len(moved.requests) == PROMPTS * ANSWERS
        keys = [row["key"] for row in samples[0]]
        assert not list(find_rows([f"{key[:-1]}_" for key in keys], (), folders_beside(first, "base*/eval")))


def test_one_process_at_a_time_asks_a_base_model(
    runs: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    asked: list[str] = []
    monkeypatch.setattr(
        "ema_scale.evaluation.runs.turn", lambda place, what, wait: asked.append(what) or turn(place, what, wait=wait)
    )
    with Endpoint(lambda body, number: completion("90", [("90", -0.01)])) as endpoint:
        first, second = (make_run(runs, name, tiny_models, i, endpoint.url) for i, name in enumerate(("one", "two")))
        evaluate_run(first)
        paid = len(endpoint.requests)
        aside = runs.parent / "aside"
        (first / "base").rename(aside)
        other = threading.Thread(target=evaluate_run, args=(second,))
        with turn(first, asked[0], wait=False):
            other.start()
            until = time.monotonic() + 120
            while not (second / "eval" / "summary.json").exists():
                assert other.is_alive() and time.monotonic() < until
                time.sleep(0.05)
            assert "another process asks the base model" in caplog.text
            assert not (second / "base" / "eval" / "summary.json").exists()
            aside.rename(first / "base")
        other.join(120)
        assert (second / "base" / "eval" / "summary.json").exists()
        assert len(endpoint.requests) == paid + PROMPTS * ANSWERS
