"""Templates that write the date: evaluation tells them the date of the training."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from ema_scale.core.records import Provenance
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation import run as evaluation
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.records import Manifest
from ema_scale.evaluation.run import evaluate, is_complete
from ema_scale.evaluation.runs import targets_of
from ema_scale.inference.base import SampleResult
from ema_scale.inference.chat_prompts import Prompts
from ema_scale.recipe import build_recipe
from tests.evaluation.conftest import save_adapter
from tests.evaluation.test_run import exact_suite, recipe
from tests.tiny import CHATML, save_tiny

DATED = "{{ strftime_now('%d %B %Y') }}" + CHATML


class Recorder:
    """Answers "1", and keeps the prompts as the model would see them."""

    name = "transformers"

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.seen: list[str] = []

    def sample(self, requests: Any) -> Any:
        for request in requests:
            self.seen.append(self.prompts.tokenizer.decode(self.prompts.ids(request.messages, request.date)))
            yield SampleResult(request.key, ("1",) * request.n, ("stop",) * request.n, (1,) * request.n)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    def close(self) -> None:
        pass


@pytest.fixture
def model(tmp_path: Path) -> Any:
    path = save_tiny(tmp_path / "model")
    return build_recipe({"name": "a", "model": {"path": path, "chat_template": DATED}, "data": {"train": "x"}}).model


def on(monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    class Clock(date):
        @classmethod
        def today(cls) -> Clock:
            return cls.fromordinal(day.toordinal())

    monkeypatch.setattr(evaluation, "Date", Clock)


def ask(targets: list[EvalTarget], model: Any) -> list[str]:
    recorder = Recorder(Prompts(model))
    evaluate(targets, model, [exact_suite(1, 1)], recipe(), sampler=recorder)  # type: ignore[arg-type]
    return recorder.seen


def test_a_base_model_is_told_the_day_of_its_first_answers(tmp_path, model, monkeypatch):
    targets = [EvalTarget("base", None, tmp_path / "base", (exact_suite(1, 1),))]
    on(monkeypatch, date(2031, 5, 6))
    assert ask(targets, model)[0].startswith("06 May 2031")
    assert Manifest.read(tmp_path / "base" / "asked.json").template_date == "2031-05-06"
    on(monkeypatch, date(2032, 1, 1))
    assert ask(targets, model) == []  # the same prompts, so the answers are there
    assert is_complete(targets, model, recipe())
    more = [EvalTarget("base", None, tmp_path / "base", (exact_suite(2, 1),))]
    recorder = Recorder(Prompts(model))
    evaluate(more, model, None, recipe(), sampler=recorder)  # type: ignore[arg-type]
    assert [text[:11] for text in recorder.seen] == ["06 May 2031"]


def test_answers_under_another_date_are_not_reused(tmp_path, model):
    target = EvalTarget("t", None, tmp_path / "t", (exact_suite(1, 1),), date="2031-05-06")
    later = EvalTarget("t", None, tmp_path / "t", (exact_suite(1, 1),), date="2031-05-07")
    assert ask([target], model)[0].startswith("06 May 2031")
    assert not is_complete([later], model, recipe())
    assert ask([later], model)[0].startswith("07 May 2031")
    assert json.loads((tmp_path / "t" / "summary.json").read_text())["sampler"]["template_date"] == "2031-05-07"


def test_a_template_without_a_date_changes_no_answers_key(tmp_path, model, monkeypatch):
    plain = model.model_copy(update={"chat_template": CHATML})
    targets = [EvalTarget("base", None, tmp_path / "base", (exact_suite(1, 1),))]
    assert len(ask(targets, plain)) == 1
    on(monkeypatch, date(2032, 1, 1))
    assert ask(targets, plain) == []
    assert "template_date" not in json.loads((tmp_path / "base" / "asked.json").read_text())


def test_a_run_and_the_base_beside_it_are_told_the_date_of_the_training(tmp_path, model, monkeypatch, caplog):
    save_adapter(model.path, tmp_path / "runs" / "a" / "adapter", rank=2, seed=0)
    whole = {"name": "a", "output": str(tmp_path / "runs"), "data": {"train": "x"}, "model": model.model_dump()}
    loaded = build_recipe({**whole, "evaluation": recipe().model_dump()})
    run = RunDir(loaded.run_path)
    Provenance(template_date="2030-02-03").write(run.provenance_path)
    on(monkeypatch, date(2032, 1, 1))
    base, tuned = targets_of([run], [loaded], tmp_path / "base")
    assert [t.date for t in (base, tuned)] == ["2030-02-03"] * 2
    given = [EvalTarget(t.name, t.adapter_path, t.out_dir, (exact_suite(1, 1),), date=t.date) for t in (base, tuned)]
    assert [text[:16] for text in ask(given, model)] == ["03 February 2030"] * 2
    # A run of another day beside the same base: its base keeps the date of its answers, and that is said.
    Provenance(template_date="2030-02-04").write(run.provenance_path)
    assert [t.date for t in targets_of([run], [loaded], tmp_path / "base")] == ["2030-02-03", "2030-02-04"]
    assert "writes the date 2030-02-03" in caplog.text and "a on 2030-02-04" in caplog.text


def test_the_date_reaches_the_model_itself(tmp_path, model, monkeypatch):
    asked = []
    ids = Prompts.ids

    def spy(self: Prompts, messages: Any, date: str = "") -> list[int]:
        asked.append(date)
        return ids(self, messages, date)

    monkeypatch.setattr(Prompts, "ids", spy)
    target = EvalTarget("t", None, tmp_path / "t", (exact_suite(1, 1),), date="2031-05-06")
    evaluate([target], model, None, recipe(max_tokens=2))
    assert set(asked) == {"2031-05-06"} and len(asked) > 1  # to measure the prompts, and to sample
