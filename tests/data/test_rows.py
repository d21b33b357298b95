"""Readers: every format, and errors that name file and line."""

import json

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data.rows import load_rows

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def jsonl(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [USER, ANSWER]},
    ],
)
def test_every_format_gives_the_same_conversation(tmp_path, record):
    rows = load_rows(jsonl(tmp_path / "r.jsonl", record))
    assert [dict(m) for m in rows[0].messages] == [USER, ANSWER]
    assert rows[0].origin == f"{tmp_path / 'r.jsonl'}:1"


def test_alpaca_input_and_sharegpt_system(tmp_path):
    rows = load_rows(
        jsonl(
            tmp_path / "r.jsonl",
            {"instruction": "sum up", "input": "text", "output": "a"},
            {"system": "be brief", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        )
    )
    assert rows[0].messages[0]["content"] == "sum up\n\ntext"
    assert rows[1].messages[0] == {"role": "system", "content": "be brief"}


def test_csv_and_parquet_through_the_library(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "r.csv").write_text('prompt,completion\nq,"a\nb"\n')
    assert load_rows(tmp_path / "r.csv")[0].messages[1]["content"] == "a\nb"
    pq.write_table(pa.table({"messages": [[USER, ANSWER]]}), tmp_path / "r.parquet")
    assert dict(load_rows(tmp_path / "r.parquet")[0].messages[1]) == ANSWER


def test_columns_can_be_renamed_and_rows_limited(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", *[{"ask": "q", "reply": str(i)} for i in range(5)])
    rows = load_rows(path, columns={"ask": "prompt", "reply": "completion"}, limit=3)
    assert [r.messages[1]["content"] for r in rows] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("{not json", "not JSON"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": []}, "empty list"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty assistant turn"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages.1.role: found 'robot'"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages.1: found .*expected an object"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "found 3, expected text"),
        ({"text": "just text"}, "found the columns 'text'; expected messages"),
        ("[1, 2]", "found list, expected an object"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, record, expected):
    path = jsonl(tmp_path / "r.jsonl", {"messages": [USER, ANSWER]}, record)
    with pytest.raises(UserError, match=expected) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    rows = load_rows(path, on_bad="drop")
    assert len(rows) == 1 and [d.origin for d in rows.dropped] == [f"{path}:2"]


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="found no rows"):
        load_rows(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_rows(tmp_path / "binary.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        load_rows("nobody/no-such-set")


def test_several_sources_and_lists(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", {"prompt": "1", "completion": "a"})
    b = jsonl(tmp_path / "b.jsonl", {"prompt": "2", "completion": "a"})
    assert [r.messages[0]["content"] for r in load_rows([str(a), str(b)])] == ["1", "2"]
    assert load_rows([{"prompt": "1", "completion": "a"}])[0].origin == "row 0"


def test_hash_follows_the_content(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", {"prompt": "1", "completion": "a"})
    first = load_rows(a).sha256
    assert first == load_rows(a).sha256
    jsonl(a, {"prompt": "1", "completion": "b"})
    assert load_rows(a).sha256 != first


@pytest.mark.shared
def test_the_fields_real_rows_load(shared_data):
    for path in sorted(shared_data.glob("*.jsonl")):
        rows = load_rows(path)
        assert len(rows) >= 100 and not rows.dropped


def test_a_split_of_a_dataset_dict_is_taken_and_others_are_named():
    import datasets

    def split(text: str) -> datasets.Dataset:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
        return datasets.Dataset.from_list([{"messages": turns}] * 2)

    both = datasets.DatasetDict({"test": split("t"), "train": split("q")})
    assert [row.messages[0]["content"] for row in load_rows(both)] == ["q", "q"]
    assert [row.messages[0]["content"] for row in load_rows(both, split="test")] == ["t", "t"]
    assert len(load_rows(both["test"])) == 2
    assert load_rows(datasets.DatasetDict({"only": split("o")}))[0].messages[0]["content"] == "o"
    with pytest.raises(UserError, match="splits a, b, expected train; pass one of them"):
        load_rows(datasets.DatasetDict({"a": split("1"), "b": split("2")}))
