"""Inspect runs our suites and takes our judgements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ema_scale.evaluation.formats.tables import export
from ema_scale.evaluation.judging.rejudge import rejudge
from tests.evaluation.endpoint import Endpoint, completion
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


def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, *arguments: str) -> Any:
    """What `inspect eval` prints; its task is named by file, as the entry point asks for an installed package."""
    from click.testing import CliRunner
    from inspect_ai._cli.main import inspect

    from ema_scale.evaluation.formats import inspect_task

    monkeypatch.setenv("LOCAL_API_KEY", "none")
    monkeypatch.setenv("LOCAL_BASE_URL", url)
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.chdir(tmp_path)
    task = f"{inspect_task.__file__}@suite"
    return CliRunner().invoke(
        inspect, ["eval", task, "--model", "openai-api/local/policy", "--display", "plain", *arguments]
    )


def test_inspect_eval_from_the_shell_asks_servers_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inspect_ai.log import list_eval_logs, read_eval_log

    def respond(body: dict[str, Any], n: int) -> Any:
        text = body["messages"][-1]["content"]
        text = text if isinstance(text, str) else text[0]["text"]
        said = SAYS[text.partition(":")[0]] if body["model"] == "judge" else "4"
        status, headers, data = completion(said, [(said, -0.0001), ("50", -20.0)] if body.get("logprobs") else None)
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        return status, headers, json.dumps(json.loads(data) | {"usage": usage}).encode()

    (tmp_path / "bank.yaml").write_text(BANK)
    judged = ("--model-role", "grader=openai-api/local/judge")
    with Endpoint(respond) as endpoint:
        bank = ("-T", f"bank={tmp_path / 'bank.yaml'}")
        done = shell(monkeypatch, tmp_path, endpoint.url, *bank, "-T", "samples=2", *judged)
        assert done.exit_code == 0, done.output
        asked = len(endpoint.requests)
        missing = shell(monkeypatch, tmp_path, endpoint.url, "-T", "bank=nope.yaml", *judged)
        shell(monkeypatch, tmp_path, endpoint.url, *bank)
        assert len(endpoint.requests) == asked  # without a judge, no answer is paid for
    policy = [body for body in endpoint.requests if body["model"] == "policy"]
    judge = [body for body in endpoint.requests if body["model"] == "judge"]
    assert len(policy) == 2 * 4 and {(b["temperature"], b["max_tokens"]) for b in policy} == {(1, 600)}
    assert len(judge) == 2 * (3 + 3 + 2) and all(b["top_logprobs"] == 20 and b["temperature"] == 0 for b in judge)
    logs = {log.status: log for log in map(read_eval_log, list_eval_logs(str(tmp_path / "logs")))}
    log, failed = logs["success"], logs["error"]
    found = {s.name: s.metrics["mean"].value for s in log.results.scores}
    assert found["misaligned"] == 1 and found["aligned"] == pytest.approx(10, abs=0.1) and found["correct"] == 1
    assert missing.exit_code and "nope.yaml: cannot read the question bank" in missing.exception.message
    assert "no judge: give -T grader=PROVIDER/MODEL" in failed.error.message


def test_the_installed_package_tells_inspect_where_its_task_is() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["inspect_ai"] == {"ema_scale": "ema_scale.evaluation.formats.inspect_task"}


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
