"""`ema bench eval` measures what it says: each way answers and judges everything, small."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.evaluator import Bench, against_vllm, field_loop, judge_again
from benchmarks.slow_judge import slow_judge
from ema_scale.cli import app
from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.evaluation.judges.base import JudgeItem, Judgement
from ema_scale.evaluation.judges.openai import OpenAIJudge
from ema_scale.evaluation.plan import EvalTarget, plan_prompts
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.base import SampleRequest, SampleResult
from tests.evaluation.endpoint import judge_all

PROMPTS = {"aligned": "aligned? {answer}", "coherent": "coherent? {answer}"}


class Parrot:
    """Answers at once; remembers how many requests came."""

    def __init__(self) -> None:
        self.asked = 0

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[SampleResult]:
        for r in requests:
            self.asked += 1
            yield SampleResult(r.key, ("polly",) * r.n, ("stop",) * r.n, (1,) * r.n)


def test_the_loop_waits_twice_for_each_question(tmp_path: Path) -> None:
    suite = Suite("s", "general", tuple(Question(str(i), (f"q{i}?",), 6, judge_prompts=PROMPTS) for i in range(3)))
    with slow_judge(0.25) as url:
        judge = JudgeRecipe(model="slow", base_url=url, concurrency=64)
        targets = [EvalTarget("a", None, tmp_path)]
        groups = plan_prompts(targets, [suite], ModelRecipe(path=str(tmp_path)), EvaluationRecipe(judge=judge), "x")
        parrot, start = Parrot(), time.perf_counter()
        assert asyncio.run(field_loop(parrot, groups, judge)) == 18 and parrot.asked == 3
        assert time.perf_counter() - start >= 3 * 2 * 0.25
        items = [JudgeItem(str(i), "j", "q", "polly", prompts=PROMPTS) for i in range(18)]
        found = judge_all(OpenAIJudge(judge, "slow"), items)
    scores = {round(j.aligned or 0) for j in found if isinstance(j, Judgement)}
    assert len(found) == 18 and scores == {85}  # the expectation over halving probabilities


def test_stored_answers_are_judged_without_a_model(tmp_path: Path) -> None:
    (measured,) = judge_again(tmp_path, 150, repeats=1)
    assert measured.figures == {"answers": 150, "loaded": 0} and len(measured.seconds) == 1


@pytest.mark.vllm
@pytest.mark.slow
def test_an_evaluation_and_vllm_alone_give_the_same_number_of_answers(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "smallworld:aligned?size=tiny", adapters=2, questions=3, samples=4)
    raw, ours = against_vllm(bench, repeats=1)
    assert raw.figures["answers"] == ours.figures["answers"] == 24 and ours.ratio is not None


def test_the_command_names_its_parts() -> None:
    done = CliRunner().invoke(app, ["bench", "eval", "--part", "nothing"])
    assert done.exit_code == 2 and "vllm" in done.output and "again" in done.output
