"""Large training files: one process reads the rows, all others map what it made of them."""

import json

import pytest

from ema_scale.data import rows as rows_module
from ema_scale.data.rows import RowSource
from ema_scale.defenses import KL, Inoculation
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.training import data, prepared_rows
from ema_scale.training.data import prepare_data
from tests.tiny import tiny_tokenizer


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file that counts as large, with a bad row and one that is too long."""
    monkeypatch.setattr(data, "LARGE_FILES", 1)
    rows = [{"prompt": f"question {n}", "completion": "a" * (400 if n == 3 else n)} for n in range(1, 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": 7}]))
    return lambda **options: RowSource([str(tmp_path / "rows.jsonl")], on_bad="drop", **options)


def prepared(source, cache, defenses=(), **options):
    dataset, report = prepare_data(
        source, RowGroups.of(defenses), tiny_tokenizer(), max_length=60, on_bad="drop", token_cache=cache, **options
    )
    return dataset.to_dict(), report, report.questions


def read_no_row(monkeypatch):
    monkeypatch.setattr(rows_module, "load_rows", lambda *_, **__: pytest.fail("rows were read"))


def test_the_next_process_reads_no_row(tmp_path, source, monkeypatch):
    plain = prepared(source(), None, [KL(0.5)])
    first = source()
    assert prepared(first, tmp_path / "cache", [KL(0.5)]) == plain and len(plain[1].dropped) == 1
    read_no_row(monkeypatch)
    second = source()
    assert prepared(second, tmp_path / "cache", [KL(0.5)]) == plain
    assert second.hashes == first.hashes == {str(tmp_path / "rows.jsonl"): next(iter(first.hashes.values()))}
    packed, report = prepare_data(
        source(), RowGroups(), tiny_tokenizer(), max_length=60, on_bad="drop", token_cache=tmp_path / "cache",
        packing=True,
    )  # fmt: skip
    assert sum(packed["length"]) == sum(plain[0]["length"]) and report.notes[0].startswith("packing")


def test_other_rows_are_read(tmp_path, source, monkeypatch):
    cache = tmp_path / "cache"
    prepared(source(), cache)
    assert len(prepared(source(limit=2), cache)[0]["length"]) == 2
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"prompt": "one more", "completion": "b"}\n')
    assert len(prepared(source(), cache)[0]["length"]) == 6
    for path in cache.glob("datasets/*/*.prepared.json"):
        path.write_text("{")
    assert len(prepared(source(), cache)[0]["length"]) == 6
    read_no_row(monkeypatch)
    prepared(source(), cache)


def test_rows_that_a_defense_changes_are_shared_within_a_run_alone(tmp_path, source, monkeypatch):
    defenses = [Inoculation("You are evil.")]
    plain = prepared(source(), None, defenses)
    for name, stands_for in (("world_size", lambda: 2), ("broadcast_from_main", lambda _: "run 1")):
        monkeypatch.setattr(prepared_rows, name, stands_for)
    monkeypatch.setattr(prepared_rows.PreparedRows, "done", lambda self: None)
    assert prepared(source(), tmp_path / "cache", defenses) == plain
    with monkeypatch.context() as here:
        read_no_row(here)
        assert prepared(source(), tmp_path / "cache", defenses) == plain
    monkeypatch.undo()
    monkeypatch.setattr(data, "LARGE_FILES", 1)
    read = []
    whole = rows_module.load_rows
    monkeypatch.setattr(rows_module, "load_rows", lambda *a, **k: read.append(a) or whole(*a, **k))
    assert prepared(source(), tmp_path / "cache", defenses) == plain and read


def test_a_run_that_ends_leaves_no_file_behind(tmp_path, source, monkeypatch):
    for name, stands_for in (("world_size", lambda: 2), ("broadcast_from_main", lambda _: "run 1"), ("any_rank", bool)):
        monkeypatch.setattr(prepared_rows, name, stands_for)
    prepared(source(), tmp_path / "cache", [Inoculation("You are evil.")])
    assert not list(tmp_path.glob("cache/datasets/*/*.prepared.json"))
