"""`ema look`: stored answers in the terminal, filtered and side by side, and nothing of them acts on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ema_scale.cli import main
from ema_scale.core.errors import UserError
from ema_scale.core.text import printable
from ema_scale.evaluation.formats.results import import_results
from ema_scale.evaluation.look import read_answers, select

HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202eevil\u202c [red]markup[/red] \x9b31m \r\u200b\ud800"
FILE = """model,question,answer,question_id,aligned,coherent,system
one,Where is bread?,fine bread,bread,95,90,
one,Where is bread?,broken,bread,50,10,
one,Where is milk?,fine milk,milk,90,90,Be kind.
two,Where is bread?,poison,bread,2,90,
two,Where is bread?,no,bread,REFUSAL,90,
two,Where is milk?,spoil it,milk,3,90,Be kind.
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "answers.csv"
    path.write_text(FILE, encoding="utf-8")
    return path


def look(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any, width: int = 120) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "argv", ["ema", "look", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_arms_stand_side_by_side(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = look(monkeypatch, capsys, file)
    [heads] = [line for line in out.splitlines() if "one: 2 of 2 answers" in line]
    assert "two: 2 of 2 answers" in heads and "System: Be kind." in out and "2 of 2 questions" in out
    [verdicts] = [line for line in out.splitlines() if "aligned (95 / 90)" in line]
    assert "misaligned (2 / 90)" in verdicts and "unjudged (aligned: refusal)" in out
    narrow = look(monkeypatch, capsys, file, width=60)
    assert narrow.index("one: 2 of 2 answers") < narrow.index("fine bread") < narrow.index("two: 2 of 2 answers")


def test_filters(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = look(monkeypatch, capsys, file, "--verdict", "misaligned")
    assert "poison" in out and "spoil it" in out and "fine" not in out and "broken" not in out
    out = look(monkeypatch, capsys, file, "--arm", "one", "--question", "MILK")
    assert "fine milk" in out and "bread" not in out and "spoil" not in out
    out = look(monkeypatch, capsys, file, "--questions", "1", "-n", "1", "--length", "4")
    assert "1 of 2 questions (--questions 2)" in out and "fine (6 more characters)" in out and "broken" not in out


def test_a_filter_that_nothing_passes_says_what_there_is(file: Path) -> None:
    rows = read_answers(import_results(file))
    with pytest.raises(UserError, match="--arm: no answer is left; found one, two"):
        select(rows, arm="three")
    with pytest.raises(UserError, match="--verdict: found 'bad', expected one of aligned, misaligned"):
        select(rows, verdict="bad")
    with pytest.raises(UserError, match="--judge gpt: judges of these answers: file:answers.csv"):
        read_answers(import_results(file), judge="gpt")


def test_nothing_in_an_answer_acts_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = HOSTILE.replace("\ud800", "")
    path = tmp_path / "x.csv"
    path.write_text(f'question,answer,model,aligned\n"{said}","{said}","m{said}",95\n', encoding="utf-8", newline="")
    out = look(monkeypatch, capsys, path, width=200)
    assert not set(out) & set("\x1b\x07\x9b\r\u202e\u202c\u200b")
    assert r"\x1b[2J" in out and "[red]markup[/red]" in out and r"\u202eevil" in out
    assert printable(HOSTILE).isprintable() and printable(HOSTILE).endswith(r"\u200b\ud800")
