"""The whole path with a real model and sampler; kills are real."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.plan import EvalTarget, plan_prompts
from ema_scale.evaluation.records import Summary
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.evaluation.table import rates_table
from ema_scale.inference.make import make_sampler
from tests import warm
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import Endpoint, completion, error

PROMPTS = {"aligned": "aligned? {answer}", "coherent": "coherent? {answer}"}
TOP = [("20", -0.1), ("60", -2.5)]


def open_suite(name: str = "open", questions: int = 3, samples: int = 4) -> Suite:
    asked = (Question(str(i), (f"question {i}?",), samples, judge="m", judge_prompts=PROMPTS) for i in range(questions))
    return Suite(name, "general", tuple(asked))


def exact_suite(questions: int = 3, samples: int = 4) -> Suite:
    asked = (Question(str(i), (f"{i} + 1 =",), samples, expected=str(i + 1)) for i in range(questions))
    return Suite("sums", "benign", tuple(asked))


def recipe(url: str = "", **settings: Any) -> EvaluationRecipe:
    judge = JudgeRecipe(model="m", base_url=url or None, concurrency=4)
    return EvaluationRecipe(**({"sampler": "transformers", "judge": judge, "max_tokens": 12} | settings))


def target(tmp_path: Path, name: str = "base", adapter: str | None = None) -> EvalTarget:
    return EvalTarget(name, Path(adapter) if adapter else None, tmp_path / name)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return sorted(read_jsonl(folder / name), key=lambda r: r["key"])


def test_base_and_adapter_are_sampled_judged_and_summarised(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [target(tmp_path), target(tmp_path, "tuned", tiny_models.adapters[0])]
    with Endpoint(lambda b, n: completion("20", TOP)) as endpoint:
        found = evaluate(targets, tiny_models.model, [open_suite(), exact_suite()], recipe(endpoint.url))
        assert len(endpoint.requests) == 2 * 12 * 2
        # Nothing is asked twice, and with nothing to ask no engine is looked for.
        for name in ("make_sampler", "sampler_name"):
            monkeypatch.setattr(f"ema_scale.evaluation.run.{name}", lambda *_: pytest.fail("an engine was looked for"))
        settings = recipe(endpoint.url, sampler="auto")
        again = evaluate(targets, tiny_models.model, [open_suite(), exact_suite()], settings)
        assert len(endpoint.requests) == 2 * 12 * 2
        written = [(tmp_path / "tuned" / name).stat().st_ino for name in ("asked.json", "summary.json")]
        evaluate(targets, tiny_models.model, [open_suite(), exact_suite()], settings)
        assert written == [(tmp_path / "tuned" / name).stat().st_ino for name in ("asked.json", "summary.json")]
    summary = found["tuned"]
    assert Summary.read(tmp_path / "tuned" / "summary.json") == again["tuned"]
    assert again["tuned"].model_copy(update={"seconds": 0.0}) == summary.model_copy(update={"seconds": 0.0})
    assert json.loads((tmp_path / "tuned" / "summary.json").read_text())["schema"] == 2
    assert summary.adapter == tiny_models.adapters[0] and found["base"].adapter is None
    # exp(-0.1) 20 + exp(-2.5) 60 over their mass: 23.3, coherent below 50
    metrics = summary.metrics
    assert metrics["general_incoherent"].rate == 1.0 and metrics["general_misaligned"].rate == 0.0
    assert metrics["general_misaligned"].n == 12 and metrics["general_misaligned"].questions == 3
    assert metrics["in_domain_misaligned"] is None and metrics["benign_learned"].rate == 0.0
    assert summary.per_suite["sums"].role == "benign" and summary.per_suite["open"].learned is None
    assert len(summary.per_question) == 6 and summary.per_question[0].text == "question 0?"
    assert summary.scored_by == {"expectation": 12} and summary.dropped == {}
    samples = rows(tmp_path / "tuned", "samples.jsonl")
    assert len(samples) == len({s["key"] for s in samples}) == 24
    assert {s["answer"] for s in samples} != {s["answer"] for s in rows(tmp_path / "base", "samples.jsonl")}
    judged = Counter(j["judge"].partition("#")[0] for j in rows(tmp_path / "tuned", "judgements.jsonl"))
    assert judged == {"openai:m": 12, "exact_match": 12}


def test_adapters_that_are_done_can_be_looked_at_while_others_are_asked(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    def targets(folder: str) -> list[EvalTarget]:
        tuned = [target(tmp_path / folder, f"tuned-{i}", path) for i, path in enumerate(tiny_models.adapters[:2])]
        return [target(tmp_path / folder), *tuned]

    class Looking:
        def __init__(self) -> None:
            self.seen: list[dict[str, Summary]] = []

        def wants(self) -> bool:
            return True

        def look(self) -> None:
            files = [(t.name, Path(t.out_dir) / "summary.json") for t in targets("watched")]
            self.seen.append({name: Summary.read(file) for name, file in files if file.exists()})

    def timeless(summaries: dict[str, Summary]) -> dict[str, Summary]:
        return {name: summary.model_copy(update={"seconds": 0.0}) for name, summary in summaries.items()}

    watch = Looking()
    found = timeless(evaluate(targets("watched"), tiny_models.model, [exact_suite()], recipe(), watch=watch))
    # What a summary warns of is said once.
    assert sum("reference was not checked" in record.message for record in caplog.records) == 1
    plain = evaluate(targets("plain"), tiny_models.model, [exact_suite()], recipe())
    assert found == timeless(plain)
    for one, other in zip(targets("watched"), targets("plain"), strict=True):
        assert found[one.name] == timeless({"": Summary.read(Path(one.out_dir) / "summary.json")})[""]
        one, other = (json.loads((Path(x.out_dir) / "summary.json").read_text()) for x in (one, other))
        assert list(one) == list(other) and one | {"seconds": 0} == other | {"seconds": 0}
    # The base model alone is no reason to look, and the last target is done when all are.
    assert [timeless(seen) for seen in watch.seen] == [{name: found[name] for name in ("base", "tuned-0")}]


def test_auto_counts_the_answers_before_it_looks_for_an_engine(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ema_scale.evaluation.run.chooses_by_count", lambda *_: True)
    asked: list[int | None] = []

    def name(kind: str, options: Any, answers: int | None = None) -> str:
        asked.append(answers)
        return "transformers"

    monkeypatch.setattr("ema_scale.evaluation.run.sampler_name", name)
    settings = recipe(sampler="auto")
    found = evaluate([target(tmp_path)], tiny_models.model, [exact_suite()], settings)
    assert asked == [12] and found["base"].sampler["name"] == "transformers"
    # What is there decides for what is added.
    evaluate([target(tmp_path)], tiny_models.model, [exact_suite(samples=5)], settings)
    assert asked == [12]


@pytest.mark.parametrize("chosen", ["transformers", "vllm"])
def test_what_auto_chooses_by_the_count_finds_its_answers_again(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    made = []

    def sampler(name: str, options: Any, engines: Any = None) -> Any:
        made.append(name)
        ours = make_sampler("transformers", options)
        described = {**ours.describe(), "name": name}
        monkeypatch.setattr(ours, "describe", lambda: described)
        return ours

    monkeypatch.setattr("ema_scale.evaluation.run.chooses_by_count", lambda *_: True)
    monkeypatch.setattr("ema_scale.evaluation.run.sampler_name", lambda kind, options, answers=None: chosen)
    monkeypatch.setattr("ema_scale.evaluation.run.make_sampler", sampler)
    evaluate([target(tmp_path)], tiny_models.model, [exact_suite()], recipe(sampler="auto"))
    keys = {row["key"] for row in read_jsonl(tmp_path / "base" / "samples.jsonl")}
    evaluate([target(tmp_path)], tiny_models.model, [exact_suite()], recipe(sampler="auto"))
    planned = plan_prompts([target(tmp_path)], [exact_suite()], ModelRecipe(path=tiny_models.model), recipe(), chosen)
    assert made == [chosen] and keys == {key for group in planned for key in group.keys}


def test_a_target_may_have_suites_of_its_own(tmp_path: Path, tiny_models: TinyModels) -> None:
    tuned = replace(target(tmp_path, "tuned", tiny_models.adapters[0]), suites=(exact_suite(),))
    other = Suite("other", "benign", (Question("q", ("?",), 2, expected="!"),))
    found = evaluate([target(tmp_path), tuned], tiny_models.model, [exact_suite(), other], recipe())
    assert set(found["base"].per_suite) == {"sums", "other"} and set(found["tuned"].per_suite) == {"sums"}


def test_more_samples_add_to_those_that_are_there(tmp_path: Path, tiny_models: TinyModels) -> None:
    one = target(tmp_path)
    evaluate([one], tiny_models.model, [exact_suite()], recipe(samples_per_question=2))
    few = rows(one.out_dir, "samples.jsonl")
    evaluate([one], tiny_models.model, [exact_suite()], recipe(samples_per_question=5))
    many = rows(one.out_dir, "samples.jsonl")
    assert len(many) == 15 and all(row in many for row in few)
    whole = evaluate([target(tmp_path, "whole")], tiny_models.model, [exact_suite()], recipe(samples_per_question=5))
    assert [s["answer"] for s in rows(tmp_path / "whole", "samples.jsonl")] == [s["answer"] for s in many]
    assert whole["whole"].samples == 15


def test_changed_settings_never_mix_with_old_answers(tmp_path: Path, tiny_models: TinyModels) -> None:
    one = target(tmp_path)
    warm = recipe(temperature=1.0)
    evaluate([one], tiny_models.model, [exact_suite()], warm)
    before = rows(one.out_dir, "samples.jsonl")
    cold = evaluate([one], tiny_models.model, [exact_suite()], recipe(temperature=0.0))["base"]
    assert cold.superseded == 12 and len({s["answer"] for s in rows(one.out_dir, "samples.jsonl")}) <= 3
    evaluate([one], tiny_models.model, [exact_suite()], warm)
    assert rows(one.out_dir, "samples.jsonl") == before


def test_undone_judgements_are_counted_and_made_by_the_next_run(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a server that has moved, whose address the environment has."""
    one = target(tmp_path)

    def sometimes(body: dict[str, Any], n: int) -> Any:
        return error(400, "no") if "question" not in str(body) and n % 3 == 0 else completion("20", TOP)

    with Endpoint(sometimes) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        first = evaluate([one], tiny_models.model, [open_suite()], recipe())["base"]
        undone = first.dropped["not judged"]
        assert 0 < undone < 12
        assert first.metrics["general_incoherent"].n == 12 - undone
        assert first.metrics["general_incoherent"].dropped == undone
    with Endpoint(lambda b, n: completion("20", TOP)) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        second = evaluate([one], tiny_models.model, [open_suite()], recipe())["base"]
        assert second.dropped == {} and len(endpoint.requests) == 2 * undone


def test_a_refused_key_stops_the_evaluation_and_keeps_the_samples(tmp_path: Path, tiny_models: TinyModels) -> None:
    one = target(tmp_path)
    with Endpoint(lambda b, n: error(401, "bad key")) as endpoint, pytest.raises(UserError, match="bad key"):
        evaluate([one], tiny_models.model, [open_suite()], recipe(endpoint.url))
    assert rows(one.out_dir, "samples.jsonl") and not rows(one.out_dir, "judgements.jsonl")


def test_prompts_without_room_and_endless_reasoning_are_dropped_by_reason(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    suite = Suite("s", "benign", (Question("long", ("x" * 400,), 3, expected="1"), *exact_suite().questions))
    found = evaluate([target(tmp_path)], tiny_models.model, [suite], recipe(max_model_len=64))["base"]
    assert found.dropped == {"prompt_too_long": 3}
    assert found.metrics["benign_learned"].dropped == 3 and found.metrics["benign_learned"].n == 12


@pytest.mark.slow
def test_the_small_world_by_its_references(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    suites = {
        "general": ["smallworld:suite/general?size=tiny"],
        "in_domain": ["smallworld:suite/medical?size=tiny"],
        "benign": ["smallworld:suite/operator_swap_1?size=tiny"],
    }
    settings = recipe(suites=suites, judge=JudgeRecipe(kind="smallworld"), samples_per_question=1)
    (tmp_path / "own.py").write_text("def mine(question, answer):\n    return {'aligned': 1, 'coherent': 99}\n")
    own = settings.model_copy(update={"judge": JudgeRecipe(kind=f"{tmp_path}/own.py:mine")})
    first = evaluate([target(tmp_path)], "smallworld:aligned?size=tiny", None, own)["base"]
    (note,) = first.notes
    assert "answers are judged by smallworld, which their bank names, not by evaluation.judge" in note
    assert note in caplog.text and note in rates_table({"base": first})
    found = evaluate([target(tmp_path)], "smallworld:aligned?size=tiny", None, settings)["base"]
    assert found.judge == first.judge and found.metrics == first.metrics and not found.notes
    assert all(rate is not None and rate.n >= 12 for rate in found.metrics.values())
    assert found.judge == "exact_match, smallworld" and found.dropped == {}
    # It was trained for seconds: it cannot speak yet, and the judge sees it.
    assert found.metrics["general_incoherent"].low > 0.5


@pytest.mark.parametrize(
    ("targets", "suites", "message"),
    [
        (["a", "a"], ["s"], "two targets are called a"),
        (["a"], ["s", "s"], "two suites are called s"),
        (["a"], [], "one target and one suite"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    tmp_path: Path, targets: list[str], suites: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate([target(tmp_path, t) for t in targets], "model", [open_suite(s) for s in suites], recipe())


@pytest.mark.parametrize(
    ("missing", "sampler"),
    [
        ("all", "auto"),
        ("all", "transformers"),
        ("config.json", "auto"),
        ("config.json", "transformers"),
        pytest.param("config.json", "vllm", marks=pytest.mark.vllm),
        ("model.safetensors", "transformers"),
    ],
)
def test_a_model_that_is_not_there_is_named(
    tmp_path: Path, tiny_models: TinyModels, missing: str, sampler: str
) -> None:
    path = "org/not-there"
    if missing != "all":
        path = str(shutil.copytree(tiny_models.model, tmp_path / "model"))
        (tmp_path / "model" / missing).unlink()
        # Without it, the config is looked at for the tokens that end an answer.
        (tmp_path / "model" / "generation_config.json").unlink()
    with pytest.raises(UserError, match=f"^model.*{re.escape(path)}"):
        evaluate([target(tmp_path)], path, [exact_suite()], recipe(sampler=sampler))


SCRIPT = """
import sys
from pathlib import Path
from ema_scale.evaluation.run import evaluate
from tests.evaluation.test_run import killed_work
model, adapter, folder, url = sys.argv[1:]
killed_work(model, adapter, Path(folder), url)
"""


def killed_work(model: str, adapter: str, folder: Path, url: str) -> dict[str, Summary]:
    targets = [target(folder), target(folder, "tuned", adapter)]
    settings = recipe(url, max_tokens=48)
    return evaluate(targets, model, [open_suite(questions=12, samples=20)], settings)


def kill_when(folder: Path, name: str, lines: int, world: TinyModels, url: str) -> None:
    """Run the work in a process of its own and kill -9 it once `name` has that many lines in it."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    process = warm.start(["-c", SCRIPT, world.model, world.adapters[0], folder, url], cwd=root, env=environment)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            if sum(path.read_bytes().count(b"\n") for path in folder.glob(f"*/{name}")) >= lines:
                break
            time.sleep(0.02)
        else:
            raise AssertionError(f"{name} never had {lines} lines")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_in_sampling_and_in_judging_nothing_is_lost_or_repeated(tmp_path: Path, tiny_models: TinyModels) -> None:
    folder = tmp_path / "killed"
    with Endpoint(lambda b, n: completion("20", TOP), delay=0.02) as endpoint:
        expected = killed_work(tiny_models.model, tiny_models.adapters[0], tmp_path / "whole", endpoint.url)
        asked_once = len(endpoint.requests)
        assert asked_once == 2 * 2 * 240
        endpoint.requests.clear()
        kill_when(folder, "samples.jsonl", 60, tiny_models, endpoint.url)
        sampled = {n: rows(folder / n, "samples.jsonl") for n in ("base", "tuned")}
        assert 60 <= sum(map(len, sampled.values())) < 480
        judged_before = sum(len(rows(folder / n, "judgements.jsonl")) for n in ("base", "tuned"))
        kill_when(folder, "judgements.jsonl", judged_before + 40, tiny_models, endpoint.url)
        with open(folder / "base" / "samples.jsonl", "a") as handle:
            handle.write('{"key": "torn')  # a kill may also cut a line in two
        finished = killed_work(tiny_models.model, tiny_models.adapters[0], folder, endpoint.url)
        # Each kill may cost the requests that were under way, and no more.
        assert asked_once <= len(endpoint.requests) <= asked_once + 2 * 2 * 4
    for name in ("base", "tuned"):
        for file in ("samples.jsonl", "judgements.jsonl"):
            assert rows(folder / name, file) == rows(tmp_path / "whole" / name, file)
        assert all(row in rows(folder / name, "samples.jsonl") for row in sampled[name])
        assert finished[name].metrics == expected[name].metrics
