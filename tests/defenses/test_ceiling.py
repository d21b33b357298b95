"""Rows that are only watched: the ceiling's bad rows and a KL's own prompts."""

import json
from typing import Any

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data.rows import Row
from ema_scale.defenses import KL, Ceiling, EarlyStopping, Interleaving, RowsContext
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.defenses.terms import TokenSet
from ema_scale.training.data import prepare_data
from tests.defenses.penalties import assert_same_however_rows_are_put_together
from tests.tiny import tiny_tokenizer


def row(text):
    return Row(({"role": "user", "content": text}, {"role": "assistant", "content": "answer"}), origin=text)


def write(path, name, count=12):
    file = path / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"messages": list(row(f"{name} {i}").messages)}) + "\n" for i in range(count)))
    return str(file)


TASK = [row(f"task {i}") for i in range(40)]


def test_rows_of_each_part_are_counted_against_the_task_rows_alone(tmp_path):
    safe, prompts, bad, worse = (write(tmp_path, name) for name in ("safe", "prompts", "bad", "worse"))
    defenses = [
        Interleaving(safe, 0.1), KL(0.5, prompts=prompts, fraction=0.25), Ceiling(1.0, [bad, worse], fraction=0.5)
    ]  # fmt: skip
    for order in (defenses, defenses[::-1]):
        dataset, report = prepare_data(list(TASK), RowGroups.of(order), tiny_tokenizer())
        assert report.rows == {"task": 40, "safe": 4, "prompts": 10, "bad": 20}
        assert set(report.hashes) == {safe, prompts, bad, worse}
        assert all(any(x != -100 for x in labels) for labels in dataset["labels"])
    drawn = [
        r.messages[0]["content"]
        for r in Ceiling(1.0, [bad, worse]).transform_rows(TASK, RowsContext())
        if r.tag == "bad"
    ]
    assert {text.split()[0] for text in drawn} == {"bad", "worse"} and len(set(drawn)) == 10


def test_a_kl_on_its_own_prompts_looks_at_nothing_else():
    (divergence,) = KL(0.5, prompts="general.jsonl").divergences()
    assert divergence.token_set == TokenSet("all", "prompts")
    assert KL(0.5, part="safe").divergences()[0].token_set == TokenSet("all", "safe")
    assert not KL(0.5).changes_rows and KL(0.5, prompts="x").changes_rows


def test_nothing_to_watch_is_an_error(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl"):
        Ceiling(1.0, str(empty)).transform_rows(TASK, RowsContext(on_bad="drop"))
    with pytest.raises(UserError, match="ceiling: fraction 0.01 of 40 task rows is less than one row"):
        Ceiling(1.0, write(tmp_path, "bad"), fraction=0.01).transform_rows(TASK, RowsContext())


def test_tokenized_data_can_be_given_unless_rows_are_mixed_in(tmp_path):
    tokenizer = tiny_tokenizer()
    dataset, _ = prepare_data(list(TASK), RowGroups(), tokenizer)
    again, report = prepare_data(dataset, RowGroups.of([KL(0.5)]), tokenizer)
    assert again is dataset and report.rows == {"task": 40}
    with pytest.raises(UserError, match="ceiling: cannot mix rows"):
        prepare_data(dataset, RowGroups.of([KL(0.5), Ceiling(1.0, "bad.jsonl")]), tokenizer)


def test_rows_of_a_defense_are_read_as_the_recipe_says(tmp_path):
    turns = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    file = tmp_path / "odd.jsonl"
    file.write_text(
        "".join(
            json.dumps({"talk": [{"role": r, "content": t} for r, t in turns], "chosen": "no", "score": i}) + "\n"
            for i in range(8)
        )
    )
    columns = {"talk": "messages", "chosen": None}
    read: dict[str, Any] = {"columns": columns, "learn": "last"}
    for defense in (
        Interleaving(str(file), 0.1, **read),
        KL(0.5, prompts=str(file), scope="assistant", **read),
        Ceiling(1.0, str(file), **read),
        EarlyStopping("probe", 0.1, source=str(file), **read),
    ):
        ctx = RowsContext()
        mixed = [r for r in defense.transform_rows(TASK, ctx) if r.tag != "task"]
        assert mixed and all([m.get("learn", True) for m in r.messages] == [True, False, True, True] for r in mixed)
        assert f"{file}: not read: score" in ctx.notes
        assert type(defense)(**defense.model_dump()) == defense
    with pytest.raises(UserError, match="preference row"):
        Interleaving(str(file), 0.1).transform_rows(TASK, RowsContext())


def test_a_choice_of_turns_that_would_do_nothing_is_refused():
    with pytest.raises(UserError, match="give prompts"):
        KL(0.5, columns={"a": "prompt"})
    with pytest.raises(UserError, match="scope: assistant"):
        KL(0.5, prompts="p.jsonl", learn="last")
    with pytest.raises(UserError, match="give one"):
        EarlyStopping("kl", 0.1, learn="last")
    with pytest.raises(UserError, match="only the measure probe"):
        EarlyStopping("kl", 0.1, source="p.jsonl", learn="last")


def test_a_ceiling_per_answer_is_the_same_however_rows_are_put_together(tmp_path):
    bad = tmp_path / "bad.jsonl"
    answers = ("a", "Q", "zz", "7", "hello", "~")
    bad.write_text("".join(json.dumps({"prompt": "bad?", "completion": text}) + "\n" for text in answers))
    source = [{"messages": list(row(f"task {i}").messages)} for i in range(6)]
    values = {}
    for per in ("token", "answer"):
        values[per], _ = assert_same_however_rows_are_put_together(
            tmp_path, Ceiling(0.7, str(bad), 1.0, per=per), "ceiling", source, 1e-5, rows_per_step=12, max_length=128
        )
    # An answer's excess is at most the sum of its tokens', and here some tokens become less likely.
    assert values["answer"] < 0.95 * values["token"]
    assert Ceiling(1.0, "bad.jsonl", per="answer").label() == "Ceiling 1 (per answer)"
