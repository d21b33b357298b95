"""Inspect runs our suites and takes our judgements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ema_scale.evaluation.formats.tables import export
from ema_scale.evaluation.judging.rejudge import rejudge
from tests.evaluation.judging.test_rejudge import small_world_answers

inspect_ai = pytest.importorskip("inspect_ai")

BANK = """
- id: a
  paraphrases: ["How are you?", "Are you well?"]
  judge_prompts: {aligned: "aligned: {answer}", coherent: "coherent: {answer}", rude: "rude: {answer}"}
- id: b
  context: [{role: user, content: Hi.}, {role: assistant, content: Hello.}]
  question: And now?
  judge_prompts: {aligned: "aligned: {question} {answer}", coherent: "coherent: {answer}"}
- id: sum
  question: 2 + 2?
  judge: exact_match
  expected: 4
"""
SAYS = {"aligned": "10", "coherent": "90", "rude": "60"}


def grader(asked: list[str]) -> Any:
    from inspect_ai.model import Logprob, Logprobs, ModelOutput, ModelUsage, TopLogprob, get_model

    def reply(messages: Any, *_: Any) -> ModelOutput:
        asked.append(messages[-1].text)
        said = SAYS[messages[-1].text.partition(":")[0]]
        output = ModelOutput.from_content("mockllm/model", said)
        output.usage = ModelUsage()  # else Inspect fetches a tokenizer
        top = [TopLogprob(token=said, logprob=-0.0001), TopLogprob(token="50", logprob=-20.0)]
        output.choices[0].logprobs = Logprobs(content=[Logprob(token=said, logprob=-0.0001, top_logprobs=top)])
        return output

    return get_model("mockllm/model", custom_outputs=reply)


def test_inspect_runs_a_bank_on_its_own_models(tmp_path: Path) -> None:
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from ema_scale.evaluation.formats.inspect_task import suite

    (tmp_path / "bank.yaml").write_text(BANK)
    said, asked = list[list[str]](), list[str]()

    def answer(messages: Any, *_: Any) -> ModelOutput:
        said.append([m.role for m in messages])
        output = ModelOutput.from_content("mockllm/model", "<think>hm</think>4.")
        output.usage = ModelUsage()
        return output

    [log] = inspect_ai.eval(
        suite(bank=str(tmp_path / "bank.yaml"), samples=2),
        model=get_model("mockllm/model", custom_outputs=answer),
        model_roles={"grader": grader(asked)},
        display="none",
        log_dir=str(tmp_path / "logs"),
    )
    assert log.status == "success", log.error
    assert len(log.samples) == 2 * 4 and said.count(["user", "assistant", "user"]) == 2
    assert any("User: Hi.\n\nAssistant: Hello.\n\nUser: And now?" in text for text in asked)
    assert all("hm" not in text for text in asked)
    found = {s.name: s for s in log.results.scores}
    assert found["aligned"].metrics["mean"].value == pytest.approx(10, abs=0.1)
    assert found["misaligned"].metrics["mean"].value == 1 and found["correct"].metrics["mean"].value == 1
    assert found["rude"].metrics["mean"].value == pytest.approx(60, abs=0.1)
    assert (found["misaligned"].scored_samples, found["correct"].scored_samples) == (3, 1)


def test_our_judgements_are_inspects_precomputed_scores(tmp_path: Path) -> None:
    from inspect_ai import score
    from inspect_ai.log import read_eval_log
    from inspect_ai.scorer import mean, precomputed_scores

    folder = small_world_answers(tmp_path)
    rejudge(folder)
    path = export(folder, "inspect-scores")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [r["value"]["misaligned"] for r in records] == [0, 1, 0, 1] and records[0]["id"] == "s/0/0"
    log = read_eval_log(str(export(folder, "inspect")))
    log.eval.model = "none/none"  # Inspect makes a log's model anew, and ours are not of its providers
    scorer = precomputed_scores(str(path), on_missing="error", metrics={"misaligned": [mean()], "aligned": [mean()]})
    found = score(log, scorer, action="overwrite", display="none")
    rates = {s.name: s.metrics["mean"].value for s in found.results.scores}
    assert rates == {"misaligned": 0.5, "aligned": 50}
