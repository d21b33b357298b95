"""`ema eval --dry-run`: what is asked, of whom, how often and by which judge, and what is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from ema_scale.cli import main
from ema_scale.core.io import append_jsonl
from ema_scale.evaluation.plan import plan_prompts
from ema_scale.evaluation.records import Judgement
from ema_scale.inference.base import SampleResult
from ema_scale.recipe import load_recipe
from ema_scale.study.evaluate import planned_evaluation

BANK = """
- id: a
  paraphrases: ["How are you?", "Are you well?"]
  samples_per_paraphrase: 3
- id: b
  question: What now?
  samples_per_paraphrase: 4
"""
SUMS = "- {id: s, question: '2 + 2?', expected: 4, samples_per_paraphrase: 5}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "bank.yaml").write_text(BANK)
    (tmp_path / "sums.yaml").write_text(SUMS)
    (tmp_path / "prompts.yaml").write_text("aligned: a {answer}\ncoherent: c {answer}\n")
    values = {
        "name": "run",
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "nowhere")},
        "data": {"train": "rows.jsonl"},
        "evaluation": {
            "sampler": "transformers",
            "suites": {"general": [str(tmp_path / "bank.yaml")], "benign": [str(tmp_path / "sums.yaml")]},
            "judge": {"model": "judge-1", "prompts": str(tmp_path / "prompts.yaml"), "check": 0},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def dry_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str
) -> list[str]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(sys, "argv", ["ema", "eval", str(recipe), "--dry-run", *overrides])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_counts_and_writes_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = dry_run(recipe, monkeypatch, capsys)
    text = "\n".join(lines)
    assert "bank (general): 2 questions in 3 wordings, 10 answers; 0 are there, 0 judged; judge openai:judge-1#" in text
    assert "sums (benign): 1 question, 5 answers; 0 are there, 0 judged; judge exact_match" in text
    assert "sample   15 of 15 answers by transformers: temperature 1, top_p 1, up to 600 tokens" in text
    assert any(line.startswith("judge    10 answers by openai:judge-1#") and "20 calls" in line for line in lines)
    assert "judge    5 answers by exact_match, without a model" in lines
    assert "judge    the environment variable OPENAI_API_KEY is not set: it holds the key" in lines
    assert not (recipe.parent / "runs").exists()
    asked = ("evaluation.samples_per_question=50", "evaluation.judge.check=2")
    more = "\n".join(dry_run(recipe, monkeypatch, capsys, *asked))
    assert "100 answers; 0 are there" in more and "and 52 hand-labelled ones, 2 times each" in more
    priced = dry_run(
        recipe, monkeypatch, capsys, "evaluation.judge.price_input=1000", "evaluation.judge.price_output=0"
    )
    assert any("at the recipe's prices" in line and "20 calls" in line for line in priced)


def test_a_dry_run_counts_written_answers_apart(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "bank.yaml").write_text(
        "- {id: a, question: Well, answers: {aligned: [one, two], misaligned: [three, four]}}\n"
    )
    text = "\n".join(dry_run(recipe, monkeypatch, capsys))
    assert "bank-choices (general): 1 question, 4 written answers; 0 are scored" in text
    assert "score    4 of 4 written answers by transformers" in text and "sample   5 of 5 answers" in text


def test_a_bank_that_names_its_judge_wins_over_the_users_own_and_that_is_said(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "own.py").write_text("def mine(question, answer):\n    return {'aligned': 1, 'coherent': 99}\n")
    own = (f"evaluation.judge.kind={recipe.parent}/own.py:mine", "evaluation.judge.model=null")
    assert "which their bank names" not in "\n".join(dry_run(recipe, monkeypatch, capsys, *own))
    (recipe.parent / "bank.yaml").write_text(
        BANK.replace("question: What now?", "question: What now?\n  judge: exact_match\n  expected: nothing")
    )
    said = "judge    4 answers are judged by exact_match, which their bank names, not by evaluation.judge ("
    assert any(line.startswith(said) for line in dry_run(recipe, monkeypatch, capsys, *own))
    assert any(line.startswith(f"{said}judge-1)") for line in dry_run(recipe, monkeypatch, capsys))


def test_a_dry_run_sees_what_is_there(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [group] = planned_evaluation(recipe)
    loaded = load_recipe(recipe)
    first = plan_prompts(group.targets, (), loaded.model, loaded.evaluation, "transformers")[0]
    folder = group.targets[0].out_dir
    rows = list(first.rows(0, SampleResult("k", ("yes",) * 3, ("stop",) * 3, (1,) * 3)))
    append_jsonl(folder / "samples.jsonl", (row.to_row() for row in rows))
    one = Judgement(key=rows[0].key, judge=first.judge.identity, aligned=90.0, coherent=90.0)
    append_jsonl(folder / "judgements.jsonl", [one.to_row()])
    text = "\n".join(dry_run(recipe, monkeypatch, capsys))
    assert "10 answers; 3 are there, 1 judged" in text and "sample   12 of 15 answers" in text
    assert "judge    9 answers by openai:judge-1#" in text and "18 calls" in text
