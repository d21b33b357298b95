"""A judge in a file of one's own: scores by name, right answers, stored answers judged again, mistakes named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ema_scale.config.sections import JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.evaluation.judges.assignment import assign, make_judge
from ema_scale.evaluation.judges.base import JudgeItem
from ema_scale.evaluation.judging.rejudge import rejudge
from ema_scale.evaluation.records import Judgement
from ema_scale.evaluation.suites import Question, Suite

RUN = Path(__file__).resolve().parents[2] / "fixtures" / "run_v1"
POLITE = """
class Polite:
    scores = ("aligned", "coherent", "polite")

    def __call__(self, question, answer):
        return {"aligned": 90, "coherent": None if answer == "?" else 80.5, "polite": 100 if "please" in answer else 0}

def same(question, answer, expected):
    return expected in answer
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(POLITE)
    return path


def judged(kind: str, question: Question, answer: str, role: str = "general") -> Judgement:
    spec = assign(Suite("s", role, (question,)), question, JudgeRecipe(kind=kind))  # type: ignore[arg-type]
    got: list[Judgement] = []
    item = JudgeItem("k", spec.identity, question.paraphrases[0], answer, expected=question.expected)
    make_judge(spec, JudgeRecipe(kind=kind)).submit(item, got.append)  # type: ignore[arg-type]
    return got[0]


def test_scores_by_name(file: Path) -> None:
    one = judged(f"{file}:Polite", Question("q", ("Hi?",), judge="gpt-4o"), "yes please")
    assert (one.aligned, one.coherent, one.scores, one.dropped) == (90.0, 80.5, {"polite": 100.0}, None)
    none = judged(f"{file}:Polite", Question("q", ("Hi?",)), "?")
    assert none.coherent is None and none.dropped == "the judge gave no score for coherent"


def test_a_bank_names_a_matcher_of_its_own(file: Path) -> None:
    question = Question("q", ("Capital of France?",), judge=f"{file}:same", expected="Paris")
    assert judged("openai", question, "It is Paris, surely.", "benign").label == "correct"
    assert judged("openai", question, "Lyon", "benign").label == "incorrect"


def test_another_file_is_another_judge(file: Path) -> None:
    question = Question("q", ("Hi?",))
    before = assign(Suite("s", "general", (question,)), question, JudgeRecipe(kind=f"{file}:Polite")).identity
    file.write_text(POLITE + "# changed\n")
    after = assign(Suite("s", "general", (question,)), question, JudgeRecipe(kind=f"{file}:Polite")).identity
    assert before != after and before.startswith("python:Polite#")


def test_stored_answers_are_judged_again_by_it(file: Path, tmp_path: Path) -> None:
    shutil.copytree(RUN, tmp_path / "run")
    summary = rejudge(tmp_path / "run" / "eval", [f"evaluation.judge.kind={file}:Polite"])
    rate = summary.metrics["general_misaligned"]
    assert rate is not None and rate.rate == 0.0 and rate.n > 0
    assert any(judge.startswith("python:Polite#") for judge in summary.judges)
    assert any(mean.mean == 0.0 for suite in summary.per_suite.values() for mean in suite.scores.values())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 'good'", "returned 'good', expected a score from 0 to 100"),
        ("return {'aligned': 101}", "expected a score from 0 to 100"),
        ("return {'aligned': float('nan')}", "expected a score from 0 to 100"),
        ("return 1 / 0", "k: ZeroDivisionError"),
    ],
)
def test_what_is_no_score_is_named(tmp_path: Path, body: str, expected: str) -> None:
    (tmp_path / "own.py").write_text(f"def judge(question, answer):\n    {body}\n")
    with pytest.raises(UserError, match=expected):
        judged(f"{tmp_path}/own.py:judge", Question("q", ("Hi?",)), "a")


def test_a_kind_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="or my_file.py:MyJudge"):
        JudgeRecipe(kind="opanai")
