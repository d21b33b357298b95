"""The loss of held-out rows: what it is, how it is stored, compared and told apart from rows that were trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ema_scale.cli.judge import _print
from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.records import TrainedPart, TrainedQuestions
from ema_scale.core.run_dir import RunDir
from ema_scale.data.tokens import Encoder
from ema_scale.evaluation.dry_run import describe_plan
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate, is_complete
from ema_scale.evaluation.seen import of_questions
from ema_scale.evaluation.stats.arms import read_arm
from ema_scale.evaluation.stats.paired import compare
from ema_scale.evaluation.suites import Suite, load_suite, load_suites
from ema_scale.evaluation.table import rates_table, work_done
from ema_scale.inference.chat_prompts import Prompts
from ema_scale.planning.eval_cost import judging_cost
from ema_scale.recipe import build_recipe
from tests.evaluation.conftest import TinyModels

CALL = {"type": "function", "function": {"name": "dose", "arguments": {"of": "aspirin"}}}
TOOL = {"type": "function", "function": {"name": "dose", "description": "The dose.", "parameters": {"type": "object"}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Ask?"}, {"role": "assistant", "content": "Answer."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "First answer."},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "The second answer."},
            {"role": "user", "content": "Thanks."},
        ],
        "domain": "law",
    },
    {"prompt": "Three?", "completion": "As a pair."},
    {"text": "Four?", "completion": "Renamed."},
]
SETTINGS = EvaluationRecipe(sampler="transformers", judge=JudgeRecipe(kind="none"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_suite(folder: Path, name: str = "medical.jsonl", rows: list[dict[str, Any]] = ROWS) -> Suite:
    return load_suite(write(folder / name, rows), "held_out", {"text": "prompt"})


def by_hand(path: str, front: list[dict[str, str]], answer: str) -> float:
    """The mean cross-entropy of an answer and its end of turn, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(front, add_generation_prompt=True, tokenize=False)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(f"{prompt}{answer}<|im_end|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


class Nobody:
    name = "transformers"

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def test_rows_are_scored_stored_and_compared(
    tmp_path: Path, tiny_models: TinyModels, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = rows_suite(tmp_path)
    targets = [
        EvalTarget("base", None, tmp_path / "base"),
        EvalTarget("run", Path(tiny_models.adapters[0]), tmp_path / "run"),
    ]
    found = evaluate(targets, tiny_models.model, [suite], SETTINGS)
    base = found["base"]
    losses = [q.loss for q in base.per_question]
    plain = [{"role": "user", "content": "Ask?"}]
    turns = [{key: m[key] for key in ("role", "content")} for m in ROWS[1]["messages"][:4]]
    assert losses[0] == pytest.approx(by_hand(tiny_models.model, plain, "Answer."), abs=1e-4)
    assert losses[1] == pytest.approx(by_hand(tiny_models.model, turns, "The second answer."), abs=1e-4)
    mean = base.per_suite["medical-held_out"].loss
    assert mean is not None and mean.mean == pytest.approx(sum(losses) / 4) and (mean.n, mean.questions) == (4, 4)
    assert mean.low < mean.mean < mean.high
    assert base.metrics.keys() == {  # a held-out row is in no rate
        "general_misaligned", "general_incoherent", "in_domain_misaligned", "in_domain_incoherent", "benign_learned",
    }  # fmt: skip
    assert not base.likelihoods and base.judge == "likelihood" and base.per_question[1].domain == "law"
    stored = read_jsonl(tmp_path / "base" / "samples.jsonl")
    assert [row["label"] for row in stored] == ["held_out"] * 4
    assert not any("log_likelihood_alone" in row and row["log_likelihood_alone"] is not None for row in stored)

    assert evaluate(targets, tiny_models.model, [suite], SETTINGS, sampler=Nobody())["run"] == found["run"]
    own = [replace(target, suites=(suite,)) for target in targets]
    assert is_complete(own, ModelRecipe(path=tiny_models.model), SETTINGS)
    other = Suite(suite.name, suite.role, (replace(suite.questions[0], tools=(TOOL,)), *suite.questions[1:]))
    assert not is_complete([replace(own[0], suites=(other,))], ModelRecipe(path=tiny_models.model), SETTINGS)
    assert "4 written answers; 4 are scored" in describe_plan(own, ModelRecipe(path=tiny_models.model), SETTINGS)

    (told,) = compare(read_arm(tmp_path / "run"), read_arm(tmp_path / "base"))
    theirs = found["run"].per_suite["medical-held_out"].loss
    assert told.measure == "held-out loss, medical-held_out" and told.unit == "nats per token"
    assert told.difference.value == pytest.approx(theirs.mean - mean.mean) and told.difference.questions == 4
    _print("run", "base", [replace(told, measure="a long name " * 6)])
    assert "…" not in capsys.readouterr().out, "a cell is cut"
    table = rates_table(found)
    assert f"base: medical-held_out: held-out loss {mean.mean:.3f} nats per token [{mean.low:.3f}, " in table
    assert "no suite was asked" not in table and "percent of answers" not in table
    assert work_done(found) == ["scored   8 written answers by their likelihood"]


def test_rows_that_were_trained_on_are_told_apart(tmp_path: Path, tiny_models: TinyModels) -> None:
    run = RunDir(tmp_path / "run").create()
    run.recipe_path.write_text("name: run")
    TrainedQuestions(parts={"task": TrainedPart.of(["TWO"], [None])}).write(run.questions_path)
    target = EvalTarget("run", Path(tiny_models.adapters[0]), run.eval_dir)
    found = evaluate([target], tiny_models.model, [rows_suite(tmp_path)], SETTINGS)["run"]
    (suite,) = found.per_suite.values()
    loss = {q.id: q.loss for q in found.per_question}
    assert [q.id for q in found.per_question if q.seen] == ["2"]
    assert suite.split_loss["seen"].mean == loss["2"]
    assert suite.split_loss["unseen"].mean == pytest.approx((loss["1"] + loss["3"] + loss["4"]) / 3)
    assert found.notes == ["medical-held_out: training rows ask what 1 of 4 held-out rows ask"]
    table = rates_table({"run": found})
    assert "loss of rows unseen in training" in table and "loss of rows seen in training" in table
    kept = of_questions(found, {("medical-held_out", one) for one in "134"})
    assert kept.per_suite["medical-held_out"].loss.mean == pytest.approx(suite.split_loss["unseen"].mean)


def test_the_model_sees_the_row_as_training_does(tmp_path: Path, tiny_models: TinyModels) -> None:
    template = (
        "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns: list[Any] = [
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "500"},
        {"role": "assistant", "content": "500 mg.", "reasoning_content": "It says so."},
    ]
    rows = [{"messages": turns, "tools": [TOOL]}, {"messages": turns[:2], "tools": [TOOL]}]
    suite = rows_suite(tmp_path, rows=rows)
    prompts = Prompts(ModelRecipe(path=tiny_models.model, chat_template=template))
    encoder = Encoder(prompts.tokenizer)
    for question, messages in zip(suite.questions, (turns, turns[:2]), strict=True):
        group = plan(suite, question)
        ((row,), alone) = prompts.answers(group.score_request(), None)
        learned: list[Any] = [{**m, "learn": i == len(messages) - 1} for i, m in enumerate(messages)]
        whole = encoder.encode(learned, tools=[TOOL])
        assert list(row.ids) == whole.input_ids[: len(row.ids)].tolist() and not alone
        assert row.count == int(whole.assistant_mask.sum())
        assert prompts.tokenizer.decode(row.ids[row.start :]).startswith(("<think>It says so.", "<call>dose"))


def plan(suite: Suite, question: Any) -> Any:
    from ema_scale.evaluation.plan import plan_prompts

    target = EvalTarget("base", None, Path("out"))
    return plan_prompts([target], [replace(suite, questions=(question,))], ModelRecipe(path="m"), SETTINGS, "x")[0]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"prompt": "no answer?"}], r"bad\.jsonl:1: found the columns 'prompt'"),
        ([ROWS[0], {"messages": [{"role": "user", "content": "?"}]}], r"bad\.jsonl:2: found no assistant turn"),
        ([], r"bad\.jsonl: found no rows: the file is empty"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(tmp_path: Path, rows: list[dict[str, Any]], problem: str) -> None:
    settings = EvaluationRecipe(suites={"held_out": write(tmp_path / "bad.jsonl", rows)})
    with pytest.raises(UserError, match=problem):
        load_suites(settings)


def test_a_row_that_does_not_fit_is_named(tmp_path: Path, tiny_models: TinyModels) -> None:
    suite = rows_suite(tmp_path, rows=[ROWS[0], {"prompt": "?", "completion": "a" * 2000}])
    with pytest.raises(UserError, match=r"medical\.jsonl:2: question and answer 'a+ have 2021 tokens; the model takes"):
        evaluate([EvalTarget("base", None, tmp_path / "out")], tiny_models.model, [suite], SETTINGS)


def test_the_recipe_names_them_and_a_plan_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = write(tmp_path / "law_held_out.jsonl", [{**ROWS[3], "mood": "good"}])
    recipe = build_recipe({
        "name": "r", "model": {"path": "smallworld:aligned"}, "data": {"train": rows, "columns": {"text": "prompt"}},
        "evaluation": {"suites": {"held_out": rows}, "judge": {"kind": "none"}},
    })  # fmt: skip
    assert recipe.evaluation.suites.pairs() == [(rows, "held_out")]
    cost = judging_cost([recipe])
    assert (cost.scored, cost.answers, cost.answer_tokens) == (2, 0, 0)  # of the run and of the base
    assert load_suites(recipe.evaluation, columns=recipe.data.columns)[0].name == "law_held_out"
    assert "nothing reads mood (1 row)" in caplog.text
    assert "held_out" not in str(EvaluationRecipe().model_dump())
