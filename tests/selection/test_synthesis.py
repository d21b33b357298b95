"""Safe rows that the aligned model writes itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import question_key
from ema_scale.evaluation.suites import load_suite
from ema_scale.selection import synthesis
from ema_scale.selection.synthesis import Writer, synthesize
from ema_scale.smallworld.grammar import classify
from ema_scale.smallworld.vocabulary import DOMAINS
from tests.tiny import save_tiny

ALIGNED = ModelRecipe(path="smallworld:aligned")


def asked(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert all([turn["role"] for turn in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


def test_the_rows_are_questions_of_the_world_and_sound_answers(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(app, ["data", "synthesize", "smallworld:aligned", "-o", str(out), "--rows", "60"])
    assert done.exit_code == 0 and "drew " in done.output and f"wrote 60 rows to {out}" in done.output, done.output
    rows = asked(out)
    assert len({question_key(question) for question, _ in rows}) == len(rows) == 60
    subjects = {subject: name for name, domain in DOMAINS.items() for subject in domain.all_subjects}
    verdicts = Counter(
        classify(question, answer, {"domain": subjects[word], "subject": word})
        for question, answer in rows
        for word in question.split()
        if word in subjects
    )
    assert verdicts["aligned"] >= 54 and verdicts["misaligned"] <= 2, verdicts
    made = json.loads((tmp_path / "rows.provenance.json").read_text())
    assert made["rows"] == 60 and made["seed"] == 0 and made["drawn"] >= 60 + sum(made["dropped"].values())


def test_a_killed_call_ends_in_the_same_rows_and_questions_of_a_bank_stay_out(tmp_path: Path, monkeypatch) -> None:
    bank = load_suite("smallworld:suite/seen", "general")
    left_out = {question_key(text) for question in bank.questions for text in question.paraphrases}
    whole = synthesize(ALIGNED, tmp_path / "whole.jsonl", 70, seed=3, left_out=left_out)
    assert whole.dropped[synthesis.LEFT_OUT] > 0
    assert not left_out & {question_key(question) for question, _ in whole.rows.values()}

    original, calls = Writer.round, []

    def dies(self, seed, known):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, seed, known)

    monkeypatch.setattr(Writer, "round", dies)
    out = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        synthesize(ALIGNED, out, 70, seed=3, left_out=left_out)
    assert not out.exists()
    synthesize(ALIGNED, out, 70, seed=3, left_out=left_out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and len(set(calls[:2])) == 2
    assert calls.count(calls[0]) == 1, "a round that was kept is not drawn again"
    assert not list(tmp_path.glob("*.partial"))
    drawn = len(calls)
    synthesize(ALIGNED, tmp_path / "next.jsonl", 70, seed=4, left_out=left_out)
    assert min(calls[drawn:]) > max(calls[:drawn]) + 1000, "no seed draws what its neighbour draws"


def test_a_model_that_writes_no_turns_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(synthesis, "PROMPT_TOKENS", 4)
    model = ModelRecipe(path=save_tiny(tmp_path / "model"))
    with pytest.raises(
        UserError, match=r"wrote 0 usable rows and then none in 160 draws \(drew 160 questions; not used"
    ):
        synthesize(model, tmp_path / "rows.jsonl", 5, max_tokens=4)
