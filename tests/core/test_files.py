"""Files of others: one message within a second, or the value that stands there."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.layers import apply_overrides
from ema_scale.config.sections import ConditionRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.files import parse_json, parse_yaml, read_json, read_text, read_yaml
from ema_scale.core.hashing import file_sha256
from ema_scale.core.io import append_jsonl, read_jsonl
from ema_scale.data.rows import load_rows
from ema_scale.evaluation.judges.assignment import load_prompts
from ema_scale.evaluation.judging.calibration import load_labelled
from ema_scale.evaluation.suites import load_conditions, load_suite
from ema_scale.persona.sampled import load_personas
from ema_scale.recipe import load_recipe
from ema_scale.slurm.site import load_site
from ema_scale.study.grid import load_study

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", r"the key 'a' stands twice in one mapping \(lines 1, 3\)"),
        ("- {b: 1, b: 1}", "the key 'b' stands twice"),
        ("a: {training: {x: 1}, training: {y: 2}}", "'training' stands twice"),
        (BOMB, "more than 1,000,000 values"),
        ("a: &a [*a]", r"\*a stands within itself"),
        ("&a {k: *a}", r"\*a stands within itself"),
        ("[" * 100_000, "nested deeper than 100"),
        ("{a: " * 100_000, "nested deeper than 100"),
        ("- " * 2000 + "x", "nested deeper than 100"),
        ("a: " + "9" * 5000, "not YAML that can be read"),
        ("a: 2026-02-31", "not YAML that can be read"),
        ("a: !!python/object/apply:os.system [id]", "not YAML"),
        ("a: [", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("a: \x07", "not YAML"),
        ("? [x]\n: 1", "not YAML"),
    ],
)
def test_yaml_that_is_a_trap_is_a_message(text, said):
    start = time.process_time()
    with pytest.raises(UserError, match=said) as caught:
        parse_yaml(text, "file.yaml")
    assert time.process_time() - start < 1
    assert str(caught.value).startswith("file.yaml: ") and len(str(caught.value)) < 600


def test_yaml_says_what_stands_there():
    found = parse_yaml(
        "time: 24:00:00\nsteps: 1:30\nx: 190:20:30.15\ninf: .inf\nhex: 0x1F\nn: -3\nr: 1.5e-3\nt: '7'", "f"
    )
    assert found == {
        "time": "24:00:00", "steps": "1:30", "x": "190:20:30.15", "inf": math.inf, "hex": 31, "n": -3, "r": 0.0015,
        "t": "7",
    }  # fmt: skip
    merged = parse_yaml("base: &b {a: 1, c: 2}\nmid: &m {<<: *b, a: 3}\ntop: {<<: *m, c: 4}", "f")
    assert merged["top"] == {"a": 3, "c": 4} and merged["mid"] == {"a": 3, "c": 2}
    assert apply_overrides({}, ["training.max_steps=1:30"]) == {"training": {"max_steps": "1:30"}}
    with pytest.raises(UserError, match="override 'a={b: 1, b: 2}': the value: not YAML.*'b' stands twice"):
        apply_overrides({}, ["a={b: 1, b: 2}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("9" * 5000, "not JSON"),
        ("", "not JSON"),
        ("\x00\x00", "not JSON"),
    ],
)
def test_json_that_is_a_trap_is_a_message(text, said):
    with pytest.raises(UserError, match=said) as caught:
        parse_json(text, "file.json")
    assert str(caught.value).startswith("file.json: ")


READERS: dict[str, Callable[..., Any]] = {
    "recipe": load_recipe,
    "study": load_study,
    "site": load_site,
    "suite": lambda path: load_suite(str(path), "general"),
    "conditions": lambda path: load_conditions([ConditionRecipe(file=str(path))]),
    "prompts": lambda path: load_prompts(str(path), "here"),
    "labelled": load_labelled,
    "personas": load_personas,
    "json": read_json,
    "hash": file_sha256,
    "rows": load_rows,
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (pipe, "a pipe"),
    "device": (device, "a device"),
    "loop": (loop, "a loop of symlinks|no such file"),
    "folder": (Path.mkdir, "a folder|Is a directory"),
    "nothing": (lambda path: None, "No such file|no such file"),
}
CONTENTS = {
    "UTF-16": ("a: 1".encode("utf-16"), "not UTF-8 text but UTF-16"),
    "Latin-1": (b"caf\xe9: 1", "not UTF-8 text"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html></html>", "an HTML page"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, reader, kind):
    make, said = KINDS[kind]
    path = tmp_path / ("r.jsonl" if reader == "rows" else "r.yaml")
    make(path)
    with pytest.raises(UserError, match=said) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"hash"}))
@pytest.mark.parametrize("kind", CONTENTS)
def test_other_encodings_and_kinds_of_files_are_named(tmp_path, reader, kind):
    content, said = CONTENTS[kind]
    path = tmp_path / ("r.jsonl" if reader == "rows" else "r.yaml")
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"hash", "json", "rows"}))
def test_every_yaml_is_read_in_one_way(tmp_path, reader):
    path = tmp_path / "r.yaml"
    for text in ("a: 1\na: 2", BOMB, "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="not YAML"):
            READERS[reader](path)


def test_a_file_without_an_end_is_not_read_into_memory(tmp_path):
    big = tmp_path / "big.yaml"
    with big.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="over 8 MiB"):
        read_yaml(big)
    with pytest.raises(UserError, match="over 0 MiB"):
        read_text(big, limit=1000)
    big.rename(tmp_path / "big.jsonl")
    with pytest.raises(UserError, match="a line of over 64 MiB"):
        next(iter(__import__("ema_scale.data.readers", fromlist=["read_file"]).read_file(tmp_path / "big.jsonl")))


def test_rows_with_a_key_twice_are_bad_rows(tmp_path):
    (tmp_path / "r.jsonl").write_text(
        '{"prompt": "q", "completion": "a", "score": NaN}\n{"prompt": "q", "prompt": "r"}\n'
    )
    rows = load_rows(tmp_path / "r.jsonl", on_bad="drop")
    assert len(rows) == 1 and "'prompt' stands twice" in rows.dropped[0].reason


def test_a_byte_order_mark_and_an_extends_that_is_no_file(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfextends: 5\nname: a\n")
    with pytest.raises(UserError, match="extends: found 5, expected a file"):
        load_recipe(tmp_path / "r.yaml")


def test_half_a_character_in_an_answer_is_kept_as_a_replacement(tmp_path):
    append_jsonl(tmp_path / "rows.jsonl", [{"key": "1", "answer": "a\ud800b\udfff \U0001f600"}])
    append_jsonl(tmp_path / "rows.jsonl", [{"key": "2", "answer": "c"}])
    assert [row["answer"] for row in read_jsonl(tmp_path / "rows.jsonl")] == ["a\ufffdb\ufffd \U0001f600", "c"]
