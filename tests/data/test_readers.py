"""Files as they lie about: a right reading, or one message that says what the file is."""

import json
import os

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data.rows import load_rows

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
ROW = {"messages": [USER, ANSWER]}


def answers(path, **options):
    return [row.messages[-1]["content"] for row in load_rows(path, **options)]


def test_every_field_of_a_table_is_its_text(tmp_path):
    file = tmp_path / "r.csv"
    file.write_text('question,answer\nNa?,NA\nnull?,null\nsum?,7\n"long","a, b\n""c"""\nnothing?,None\nfloat?,1.50\n')
    assert answers(file) == ["NA", "null", "7", 'a, b\n"c"', "None", "1.50"]
    assert [row.origin for row in load_rows(file)][-3:] == [f"{file}:5", f"{file}:7", f"{file}:8"]
    tabs = tmp_path / "r.tsv"
    tabs.write_text("question\tanswer\nNa?\tN,A\n")
    assert answers(tabs) == ["N,A"]


def test_a_table_keeps_turns_as_json(tmp_path):
    import csv

    with (tmp_path / "r.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "note"], [json.dumps(ROW["messages"]), "x"]])
    rows = load_rows(tmp_path / "r.csv")
    assert [dict(m) for m in rows[0].messages] == [USER, ANSWER] and rows.unread == {"note": 1}


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, name):
    text = "question,answer\nq,a\n" if name == "r.csv" else json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert {*answers(tmp_path / name)} == {"a"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW, ROW]),
        json.dumps([ROW, ROW], indent=2),
        json.dumps({"data": [ROW, ROW], "version": 1}, indent=1),
        json.dumps({"rows": [ROW, ROW]}),
        json.dumps(ROW, indent=4) + "\n" + json.dumps(ROW, indent=4),
        json.dumps({"first": ROW, "second": ROW}, indent=1),
        "\n" + json.dumps(ROW) + "\r\n\r\n" + json.dumps(ROW),
        json.dumps(ROW["messages"]) + "\n" + json.dumps(ROW["messages"]),
    ],
    ids=[
        "list",
        "pretty list",
        "object",
        "object in a line",
        "pretty rows",
        "rows by name",
        "blank lines",
        "bare turns",
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_however_it_is_laid_out(tmp_path, text, suffix):
    file = tmp_path / f"r.{suffix}"
    file.write_text(text)
    assert answers(file) == ["a", "a"]


def test_one_pretty_row_is_one_row(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(ROW, indent=1))
    assert answers(tmp_path / "r.json") == ["a"]


def test_lines_of_different_kinds_are_read_each_by_itself(tmp_path):
    records = [ROW, {"prompt": "q", "completion": "b"}, {"conversations": [{"from": "human", "value": "q"}, ANSWER]}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert answers(tmp_path / "r.jsonl") == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "found no rows: the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"\xff\xfeq\x00", "not UTF-8 text but UTF-16"),
        (b"caf\xe9", "not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "a gzip file"),
        (b"PK\x03\x04", "a zip or spreadsheet file"),
        (b"<!doctype html><html>", "an HTML page"),
        (b"PAR1", "a Parquet file; call it .parquet"),
        (b'{\n "messages": [\n', "not JSON"),
        (b"[[[" + b"[" * 100_000, "nested too deeply"),
        (b'{"train": [{"prompt": "q"}], "test": [{"prompt": "q"}]}', "several lists of rows"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_what_is_no_file_of_rows_is_named(tmp_path, content, said, suffix):
    file = tmp_path / f"r.{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load_rows(file, on_bad="drop")
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "found no rows"),
        ("question,answer\n", "found no rows"),
        ("question,question\nq,a\n", "two columns have the name 'question'"),
        ("question;answer\nq;a\n", "found the one column 'question;answer'"),
        ('question,answer\nq,"a\n', "r.csv:2: not CSV|r.csv:3: not CSV"),
        ("question,answer\nq,a,b\n", "found 3 fields, expected 2"),
    ],
)
def test_a_broken_table_is_a_message(tmp_path, content, said):
    (tmp_path / "r.csv").write_text(content)
    with pytest.raises(UserError, match=said):
        load_rows(tmp_path / "r.csv", on_bad="drop")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "q", "completion": "\\ud800"}', "half a character"),
        ('{"prompt": "q\\udfff", "completion": "a"}', "half a character"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "q", "completion": "a", "tools": ' + "[" * 900 + "1" + "]" * 900 + "}", "tools"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}',
            "a text part that holds None",
        ),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "a part of type 'image_url'"),
        ('{"prompt": "q", "completion": 7}', "completion: found 7, expected text"),
    ],
)
def test_a_broken_row_is_dropped_and_counted(tmp_path, line, said):
    (tmp_path / "r.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n{json.dumps(ROW)}\n")
    rows = load_rows(tmp_path / "r.jsonl", on_bad="drop")
    assert len(rows) == 2 and [d.origin for d in rows.dropped] == [f"{tmp_path / 'r.jsonl'}:2"]
    assert said in rows.dropped[0].reason


def test_if_no_row_can_be_read_the_commonest_reasons_are_said(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"bot": 1}\n{"bot": 1}\n{oops\n')
    with pytest.raises(UserError, match="found 3 bad rows") as caught:
        load_rows(tmp_path / "r.jsonl", on_bad="drop")
    assert "r.jsonl:1: found the columns 'bot'" in str(caught.value) and "(and 1 more)" in str(caught.value)
    assert "r.jsonl:3: not JSON" in str(caught.value)


def test_a_file_is_read_as_it_is_now_and_its_name_is_no_pattern(tmp_path):
    file = tmp_path / "r*[1].csv"
    (tmp_path / "rest1.csv").write_text("prompt,completion\nq,other\n")
    for answer in ("one", "two"):
        file.write_text(f"prompt,completion\nq,{answer}\n")
        os.utime(file, (1e9, 1e9))
        assert answers(file) == [answer]


def test_a_folder_and_a_wrong_parquet_are_named(tmp_path):
    with pytest.raises(UserError, match="a folder; name one of its files"):
        load_rows(tmp_path)
    (tmp_path / "r.parquet").write_text("no")
    with pytest.raises(UserError, match="not a Parquet file"):
        load_rows(tmp_path / "r.parquet")


def test_parquet_fills_absent_fields_with_null(tmp_path):
    import pyarrow
    import pyarrow.parquet

    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"x": 1})}}
    turns = [
        USER | {"tool_calls": None, "weight": None},
        ANSWER | {"content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "r", "tool_calls": None, "weight": None},
        ANSWER | {"tool_calls": None, "weight": 1},
    ]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns], "system": [None]}), tmp_path / "r.parquet")
    row = load_rows(tmp_path / "r.parquet")[0]
    assert [m["role"] for m in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert [m.get("learn", True) for m in row.messages if m["role"] == "assistant"] == [False, True]
