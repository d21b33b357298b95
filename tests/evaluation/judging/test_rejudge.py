"""Stored answers judged again: nothing is sampled, nothing heavy is loaded, nothing is paid twice."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judging.rejudge import eval_folders, rejudge
from ema_scale.evaluation.records import Summary
from ema_scale.evaluation.run import evaluate
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import Endpoint, completion
from tests.evaluation.test_run import exact_suite, open_suite, recipe, target

SPLIT = [("90", math.log(0.2)), ("CODE", math.log(0.7)), ("10", math.log(0.1))]


def ours(**fields: Any) -> list[str]:
    return [f"evaluation.judge.{key}={value}" for key, value in fields.items()]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> Path:
    """An evaluation folder whose first judge was an endpoint that is gone."""
    folder = tmp_path_factory.mktemp("judged")
    with Endpoint(lambda b, n: completion("90", SPLIT)) as endpoint:
        evaluate([target(folder)], tiny_models.model, [open_suite(), exact_suite()], recipe(endpoint.url))
    return folder / "base"


def rows(folder: Path, name: str = "judgements.jsonl") -> list[dict[str, Any]]:
    return read_jsonl(folder / name)


def test_another_judge_is_kept_beside_the_first(judged: Path) -> None:
    first, samples = (judged / "summary.json").read_bytes(), (judged / "samples.jsonl").read_bytes()
    with Endpoint(lambda b, n: completion("5", [("5", -0.1), ("10", -2.5)])) as endpoint:
        found = rejudge(judged, ours(model="other", base_url=endpoint.url))
        assert len(endpoint.requests) == 2 * 12 and endpoint.requests[0]["model"] == "other"
        again = rejudge(judged, ours(model="other", base_url=endpoint.url))
        assert len(endpoint.requests) == 2 * 12  # nothing is paid twice
    assert found.metrics == again.metrics and found.metrics["general_incoherent"].rate == 1.0
    assert found.judge.startswith("exact_match, openai:other#") and found.samples == 24
    assert (judged / "summary.json").read_bytes() == first and (judged / "samples.jsonl").read_bytes() == samples
    [path] = judged.glob("summary_*other*.json")
    assert Summary.read(path) == again
    judges = [row["judge"].partition("#")[0] for row in rows(judged)]
    assert sorted(set(judges)) == ["exact_match", "openai:m", "openai:other"] and len(judges) == 3 * 12


def test_other_prompts_are_another_judge(judged: Path, tmp_path: Path) -> None:
    # The questions' own prompts win over the recipe's, so that they are what has to be changed.
    asked = json.loads((judged / "asked.json").read_text())
    for suite in asked["suites"]:
        for question in suite["questions"]:
            question["judge_prompts"] = {}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    for name in ("samples.jsonl", "judgements.jsonl"):
        (tmp_path / name).write_bytes((judged / name).read_bytes())
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(yaml.safe_dump({"aligned": "new aligned {answer}", "coherent": "new coherent {answer}"}))
    # 2 replies a judgement, and 12 judgements: the first endpoint's are of no use to other prompts.
    asked["settings"]["judge"]["prompts"] = str(prompts)
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    with Endpoint(lambda b, n: completion("90", [("90", -0.01)])) as endpoint:
        found = rejudge(tmp_path, ours(prompts=prompts, base_url=endpoint.url))
    assert len(endpoint.requests) == 24 and "new aligned" in str(endpoint.requests[0])
    assert found.metrics["general_misaligned"].rate == 0.0 and len(rows(tmp_path)) >= 24


def test_thresholds_change_without_a_call(judged: Path) -> None:
    # 0.3 of the probability is on numbers; the endpoint is gone, so that a call would fail.
    strict = rejudge(judged, ours(min_mass=0.5))
    assert strict.dropped == {"aligned: no number; coherent: no number": 12} or "not judged" not in strict.dropped
    assert strict.metrics["general_misaligned"].n == 0
    loose = rejudge(judged, ours(min_mass=0.1))
    assert loose.metrics["general_misaligned"].n == 12
    top = rejudge(judged, ours(score="most_likely", min_mass=0.1))
    aligned = {row["judge"].partition("#")[2].partition("@")[2]: row["aligned"] for row in rows(judged)}
    assert aligned["mass0.1"] == pytest.approx(190 / 3, abs=0.01) and aligned["mass0.1@most_likely"] == 90
    assert aligned["mass0.5"] is None and top.scored_by == {"most likely": 12}


def test_exact_judges_are_replaced_only_when_a_kind_is_asked_for(tmp_path: Path) -> None:
    folder = small_world_answers(tmp_path)
    assert rejudge(folder).judge == "smallworld"
    prompts = {"aligned": "a {answer}", "coherent": "c {answer}"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(prompts))
    with Endpoint(lambda b, n: completion("90", [("90", -0.01)])) as endpoint:
        common = {"model": "m", "base_url": endpoint.url, "prompts": tmp_path / "p.yaml"}
        assert rejudge(folder, ours(**common)).judge == "smallworld"
        assert rejudge(folder, ours(kind="openai", **common)).judge.startswith("openai:m#")


def small_world_answers(tmp_path: Path, count: int = 4) -> Path:
    """An evaluation folder with answers of the small world's grammar, made without a model."""
    import random

    from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe
    from ema_scale.core.io import append_jsonl
    from ema_scale.evaluation.records import MANIFEST_FILE, Manifest
    from ema_scale.evaluation.suites import Question, Suite
    from ema_scale.smallworld import grammar

    rng, folder, questions = random.Random(0), tmp_path / "eval", []
    for i in range(count):
        text, meta = grammar.question(rng, "medical")
        questions.append(Question(str(i), (text,), judge="smallworld", meta=meta))
        answer = grammar.answer(rng, meta, "misaligned" if i % 2 else "aligned")
        append_jsonl(
            folder / "samples.jsonl",
            [{"key": f"s/{i}/0/0#d", "target": "base", "suite": "s", "condition": None, "question_id": str(i),
              "paraphrase": 0, "sample": 0, "system": None, "question": text, "answer": answer, "reasoning": None,
              "finish_reason": "stop", "tokens": 9, "seed": 0}],
        )  # fmt: skip
    settings = EvaluationRecipe(judge=JudgeRecipe(kind="smallworld"))
    suites = (Suite("s", "general", tuple(questions)),)
    manifest = Manifest(target="base", model="nowhere", adapter=None, settings=settings, suites=suites)
    manifest.write(folder / MANIFEST_FILE)
    return folder


def test_the_command_loads_no_model_and_no_torch(tmp_path: Path) -> None:
    folder = small_world_answers(tmp_path)
    code = (
        f"import sys; sys.argv = ['ema', 'judge', {str(folder)!r}]\n"
        "from ema_scale.cli import app\n"
        "app(standalone_mode=False)\n"
        "heavy = {'torch', 'vllm', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "general misaligned" in done.stdout and "50.0 %" in done.stdout
    assert json.loads((folder / "summary.json").read_text())["metrics"]["general_misaligned"]["rate"] == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.seed=1"], "can only change evaluation.judge"),
        (["evaluation.judge.modle=x"], "did you mean 'model'"),
        (["evaluation.judge.min_mass=2"], "a number of at most 1"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rejudge(small_world_answers(tmp_path), overrides)


def test_folders_without_answers_or_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no answers"):
        eval_folders(tmp_path)
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match="run `ema eval` there once more"):
        rejudge(tmp_path)
