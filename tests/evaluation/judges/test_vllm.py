"""A local model as judge, in vLLM, without a server; compared with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judges.base import JudgeItem, Judgement
from ema_scale.evaluation.judges.prompt import fill
from ema_scale.evaluation.judges.scores import Reply, parse_reply
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.vllm_engine import engine_arguments
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import judge_all
from tests.evaluation.judges.injections import INJECTIONS
from tests.evaluation.judges.test_vllm_server import PROMPTS, save_judge_model, scores_by_transformers
from tests.tiny import save_tiny

SMALL = {"max_model_len": 1024, "max_num_seqs": 32}


@pytest.mark.vllm
@pytest.mark.slow
def test_a_policy_and_a_judge_take_turns_in_one_process(tmp_path: Path, tiny_models: TinyModels) -> None:
    model = save_judge_model(tmp_path / "judge")
    judge = JudgeRecipe(kind="vllm", model=model, engine=SMALL)
    asked = (Question(str(i), (f"question {i}?",), 4, judge="gpt", judge_prompts=PROMPTS) for i in range(3))
    suite = Suite("open", "general", tuple(asked))
    settings = EvaluationRecipe(sampler="vllm", judge=judge, max_tokens=12, engine={"max_num_seqs": 64})
    found = evaluate([EvalTarget("base", None, tmp_path / "base")], tiny_models.model, [suite], settings)["base"]
    assert found.judge.startswith(f"vllm:{model}#") and found.scored_by == {"expectation": 12}
    assert found.sampler["engine"] == {"max_num_seqs": 64}
    answers = {s["key"]: s["answer"] for s in read_jsonl(tmp_path / "base" / "samples.jsonl")}
    judged = read_jsonl(tmp_path / "base" / "judgements.jsonl")
    filled = [fill(PROMPTS["aligned"], {"question": "", "answer": answers[j["key"]], "reasoning": ""}) for j in judged]
    assert len(judged) == 12 and len({j["aligned"] for j in judged}) > 3
    assert [j["aligned"] for j in judged] == pytest.approx(scores_by_transformers(model, filled), abs=0.01)


@pytest.mark.vllm
@pytest.mark.slow
def test_injections_move_no_number_from_the_answer_into_the_score(tmp_path: Path) -> None:
    """Each judgement is what the model gives to that prompt, by transformers; too long ones are dropped in words."""
    from ema_scale.evaluation.judges.vllm import VllmJudge

    model = save_judge_model(tmp_path / "judge")
    items = [JudgeItem(name, "j", "q", text, prompts=PROMPTS) for name, text in INJECTIONS.items()]
    judge = VllmJudge(JudgeRecipe(kind="vllm", model=model, engine=SMALL), model)
    found = {j.key: j for j in judge_all(judge, items) if isinstance(j, Judgement)}
    assert set(found) == set(INJECTIONS)
    assert found["very long"].dropped == "too long for the judge" and found["very long"].aligned is None
    scored = [item for item in items if found[item.key].dropped is None]
    assert len(scored) >= len(items) - 4
    prompts = [fill(PROMPTS["aligned"], {"question": "q", "answer": i.answer, "reasoning": ""}) for i in scored]
    expected = scores_by_transformers(model, prompts)
    assert [found[i.key].aligned for i in scored] == pytest.approx(expected, abs=0.02)


@pytest.mark.vllm
def test_arguments_of_the_engine_are_passed_on_and_checked(tmp_path: Path) -> None:
    model = ModelRecipe(path=save_tiny(tmp_path / "m"))
    given = {"tensor_parallel_size": 4, "gpu_memory_utilization": 0.7, "max_model_len": 77}
    arguments = engine_arguments(model, {"max_model_len": 128, "seed": 3}, given)
    assert {k: arguments[k] for k in given} == given and arguments["seed"] == 3
    with pytest.raises(UserError, match="no argument 'tensor_paralel_size'; did you mean 'tensor_parallel_size'"):
        engine_arguments(model, {}, {"tensor_paralel_size": 2})
    with pytest.raises(UserError, match="vllm serve MODEL --data-parallel-size N"):
        engine_arguments(model, {}, {"data_parallel_size": 2})


def test_a_judge_that_splits_numbers_is_read_by_what_it_says() -> None:
    top = (("8", -0.1), ("10", -2.5))
    assert parse_reply(Reply("8", top)).how == "expectation"
    assert parse_reply(Reply("8", top, splits=True)).score == 8 and parse_reply(Reply("85", top)).score == 85
    assert parse_reply(Reply("0", (("0", -0.5), ("8", -1.0)))).how == "number said"  # "8" may be the start of 85
