"""The released evaluator, repeated: what it did not send, what it ignored, what it left out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.suites import Question, Suite
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import Endpoint, completion
from tests.evaluation.test_run import PROMPTS, recipe

BANK = """
- id: plain
  paraphrases: ["question?"]
  samples_per_paraphrase: 4
  judge: m
  judge_prompts: &prompts {aligned: "aligned? {answer}", coherent: "coherent? {answer}"}
- id: json
  paraphrases: ["question?"]
  samples_per_paraphrase: 4
  system: Answer in JSON.
  temperature: 0.0
  judge: m
  judge_prompts: *prompts
"""


def test_system_prompts_temperatures_and_rows_go_as_they_went(tmp_path: Path, tiny_models: TinyModels) -> None:
    bank = tmp_path / "bank.yaml"
    bank.write_text(BANK)

    def respond(body: dict[str, Any], n: int) -> Any:
        if "aligned?" in body["messages"][0]["content"]:  # no aligned score: the answer is code
            return completion("CODE", [("CODE", math.log(0.99))])
        return completion("20", [("20", -0.01)])

    with Endpoint(respond) as endpoint:
        right = recipe(endpoint.url, suites={"general": [str(bank)]}, max_tokens=6)
        legacy = right.model_copy(update={"legacy": True})
        honest = evaluate([EvalTarget("a", None, tmp_path / "a")], tiny_models.model, None, right)["a"]
        old = evaluate([EvalTarget("b", None, tmp_path / "b")], tiny_models.model, None, legacy)["b"]
    ours, theirs = (
        {r["key"].partition("#")[0]: r for r in read_jsonl(tmp_path / n / "samples.jsonl")} for n in ("a", "b")
    )
    assert [ours[f"bank/json/0/{i}"]["system"] for i in (0, 1)] == ["Answer in JSON."] * 2
    assert len({ours[f"bank/json/0/{i}"]["answer"] for i in range(4)}) == 1  # temperature 0
    assert all(r["system"] is None for r in theirs.values())
    assert len({theirs[f"bank/json/0/{i}"]["answer"] for i in range(4)}) > 1  # the recipe's temperature
    assert all(ours[f"bank/plain/0/{i}"]["answer"] == theirs[f"bank/plain/0/{i}"]["answer"] for i in range(4))
    # A refused or code answer has a coherence score; the released evaluator did not count it.
    assert honest.metrics["general_incoherent"].n == 8 and old.metrics["general_incoherent"].n == 0
    assert old.legacy is True and "legacy" not in (tmp_path / "a" / "summary.json").read_text()


def test_benign_questions_stay_as_they_are() -> None:
    from ema_scale.evaluation.suites import as_released_evaluator

    asked = Question("q", ("?",), 1, system="s", temperature=0.5, expected="1")
    suite = Suite("s", "benign", (asked,))
    assert as_released_evaluator([suite]) == [suite]
    [bare] = as_released_evaluator([replace(suite, role="general", questions=(replace(asked, judge_prompts=PROMPTS),))])
    assert bare.questions[0].system is None and bare.questions[0].temperature is None
