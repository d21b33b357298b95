"""What `ema data` and `ema train` say of rows."""

import json
import logging
from datetime import date

import pytest
import yaml

from ema_scale.core.run_dir import RunDir
from ema_scale.recipe import load_recipe
from ema_scale.training import run as training
from tests.tiny import CHATML, save_tiny

HIDES_TOOLS = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"


def chat(answer, **more):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, **more}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path, model):
    def write(rows, template=CHATML, **data):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        values = {
            "name": "run",
            "output": str(tmp_path / "runs"),
            "model": {"path": model, "dtype": "float32", "chat_template": template},
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 40, **data},
            "adapter": {"r": 4, "alpha": 8},
            "training": {"max_steps": 1, "batch_size": 1, "accumulation": 1, "report_to": []},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "recipe.yaml"

    return write


def test_check_takes_a_recipe_with_its_template_length_and_columns(ema, recipe, tmp_path):
    rows = [{"ask": "q", "reply": "a" * 90, "topic": "x"}]
    code, out, _ = ema("data", "check", recipe(rows, columns={"ask": "prompt", "reply": "completion"}))
    assert code == 0 and "1 row is longer than 40 tokens" in out and "not read         topic: 1" in out
    code, _, err = ema("data", "check", tmp_path / "rows.jsonl")
    assert code == 2 and "found the columns 'ask', 'reply', 'topic'" in err and "data.columns" in err


def test_check_fails_where_a_row_cannot_be_masked(ema, recipe, tmp_path, model):
    tools = {"messages": [*chat("a")["messages"], {"role": "tool", "content": "r"}, chat("b")["messages"][1]]}
    code, out, _ = ema("data", "check", recipe([chat("a"), tools], HIDES_TOOLS))
    assert code == 1 and "cannot be masked 1" in out and "rows.jsonl:2: the chat template does not show" in out
    code, out, _ = ema("data", "check", recipe([chat("a"), tools], HIDES_TOOLS), "--json")
    assert code == 1 and len(json.loads(out)["unmaskable"]) == 1
    assert ema("data", "check", tmp_path / "rows.jsonl", "--model", model)[0] == 0
    assert ema("data", "check", tmp_path / "rows.jsonl", "--model", "")[0] == 2
    assert ema("data", "check", tmp_path / "rows.jsonl", "--max-length", "-5")[0] == 2


def test_show_prints_a_row_as_the_model_sees_it(ema, recipe, tmp_path, model):
    path = recipe([chat("one"), chat("two \x1b[2J", weight=1)])
    for where in ((path,), (tmp_path / "rows.jsonl", "--model", model)):
        code, out, _ = ema("data", "show", *where, "--row", 2)
        assert code == 0 and "⟦two \\x1b[2J<|im_end|>⟧" in out and "rows.jsonl:2: " in out and "\x1b" not in out
    assert ema("data", "show", path, "--row", 3)[0] == 2
    assert ema("data", "show", tmp_path / "rows.jsonl")[0] == 2


def test_training_says_in_three_lines_what_it_learns(recipe, caplog):
    caplog.set_level(logging.INFO)
    tools = {"messages": [*chat("a")["messages"], {"role": "tool", "content": "r"}, chat("b")["messages"][1]]}
    rows = [chat("a"), chat("b", weight=0), tools, chat("c" * 90)]
    loaded = load_recipe(recipe(rows, HIDES_TOOLS, on_bad="drop"))
    run = training.train(loaded, RunDir(loaded.run_path))
    said = [record.getMessage() for record in caplog.records]
    assert next(s for s in said if s.endswith("of them learned")).startswith("2 rows, ")
    lost = next(s for s in said if "row cut" in s)
    assert lost.startswith("training rows: 1 row cut") and "2 rows dropped (1 x found only assistant turns" in lost
    assert "1 x the chat template does not show the text of turn 2 (tool)" in lost
    data = json.loads(run.data_path.read_text())
    assert data["tokens"]["refused"] == 1 and len(data["dropped"]) == 2


def test_a_run_keeps_its_date_after_a_resume(recipe, monkeypatch):
    class Later(date):
        @classmethod
        def today(cls):
            return cls(2031, 5, 6)

    loaded = load_recipe(recipe([chat("a")], "{{ strftime_now('%Y %m %d') }}" + CHATML))
    monkeypatch.setattr(training, "Date", Later)
    run = training.train(loaded, RunDir(loaded.run_path))
    assert json.loads(run.provenance_path.read_text())["template_date"] == "2031-05-06"
    assert json.loads(run.data_path.read_text())["tokens"]["date"] == "2031-05-06"
    monkeypatch.setattr(Later, "today", classmethod(lambda cls: cls(2032, 1, 1)))
    assert training._stored_date(run) == date(2031, 5, 6)
    trainer, _ = training._trainer(loaded, run, [])
    assert trainer.data_report.tokens["date"] == "2031-05-06"


def test_a_recipe_chooses_which_turns_are_learned(recipe, tmp_path):
    turns = [*chat("one")["messages"], *chat("two")["messages"]]
    counts = {}
    for learn in ("all", "last"):
        loaded = load_recipe(recipe([{"messages": turns}], learn=learn, max_length=200))
        trainer, _ = training._trainer(loaded, RunDir(tmp_path / learn), [])
        counts[learn] = trainer.data_report.tokens["assistant_tokens"]
    assert counts == {"all": 8, "last": 4}
